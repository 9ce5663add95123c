"""Test LoRA's variants where they differ from it: DoRA's gradients, and the matrix that LoRA-FIX does not train."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from surm_jax.peft import AdapterConstant, DoRA, LoRA, LoRAFix, Rule, adapt, merge
from tests.peft.models import adapter_arrays, materialize, parameters, perturb, relative_error, same_bits

X = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
DY = np.random.default_rng(1).normal(size=(7, 4)).astype(np.float32)


def layer_with(method, param_dtype=jnp.float32):
    layer = materialize(lambda: nnx.Linear(6, 4, dtype=jnp.float32, param_dtype=param_dtype, rngs=nnx.Rngs(0)))
    model, adapter = adapt(layer, [Rule("", method)], rngs=nnx.Rngs(1))
    return layer, perturb(model, adapter), adapter


def gradients(model, adapter):
    graphdef, trainable, frozen = nnx.split(model, adapter.trainable, ...)

    def loss(trainable, x):
        return jnp.sum(nnx.merge(graphdef, trainable, frozen)(x) * DY)

    found, by_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(trainable, jnp.asarray(X))
    return {path[-1]: np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(found)}, by_x


def numpy_dora(layer, model, alpha, rank):
    arrays = {path.rpartition("/")[2]: a.astype(np.float64) for path, a in adapter_arrays(model).items()}
    W = np.asarray(layer.kernel[...]).astype(np.float64)
    V = W + alpha / rank * arrays["down"] @ arrays["up"]
    return arrays, V, np.linalg.norm(V, axis=0)


def test_the_magnitude_of_dora_starts_at_the_norms_of_the_columns():
    layer = materialize(lambda: nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    model, _ = adapt(layer, [Rule("", DoRA())], rngs=nnx.Rngs(1))
    np.testing.assert_allclose(
        model.delta["default"].magnitude[...], np.linalg.norm(np.asarray(layer.kernel[...]), axis=0), rtol=1e-6
    )


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_dora_and_its_gradients(param_dtype):
    """Compare with the kernel `m V / c`, where `V = W + alpha / r B A^T` and c are the norms of the columns of V.

    The gradient treats c as a constant (arXiv 2402.09353, equation 5 and section 4.3).
    """
    layer, model, adapter = layer_with(DoRA(alpha=0.6, rank=2), param_dtype)
    arrays, V, c = numpy_dora(layer, model, 0.6, 2)
    m, x, dy = arrays["magnitude"], X.astype(np.float64), DY.astype(np.float64)
    y = x @ (m * V / c) + np.asarray(layer.bias[...], np.float64)
    assert relative_error(model(jnp.asarray(X)), y) <= 1e-5
    found, by_x = gradients(model, adapter)
    dV = x.T @ (dy * m / c)
    assert relative_error(found["magnitude"], (dy * (x @ V / c)).sum(0)) <= 1e-5
    assert relative_error(found["up"], 0.3 * arrays["down"].T @ dV) <= 1e-5
    assert relative_error(found["down"], 0.3 * dV @ arrays["up"].T) <= 1e-5
    assert relative_error(by_x, dy @ (m * V / c).T) <= 1e-5
    # With the derivative of the norms, the gradient would be clearly different.
    whole = dV - V / c**2 * (V * dV).sum(0)
    assert relative_error(0.3 * whole @ arrays["up"].T, 0.3 * dV @ arrays["up"].T) > 0.1


def test_dora_beside_an_update_looks_at_the_frozen_kernel():
    layer, model, _ = layer_with(DoRA(alpha=0.6, rank=2))
    _, V, c = numpy_dora(layer, model, 0.6, 2)
    both, second = adapt(model, [Rule("", LoRA())], name="second", rngs=nnx.Rngs(2))
    both = perturb(both, second)
    up, down = (np.asarray(v[...], np.float64) for v in (both.delta["second"].up, both.delta["second"].down))
    kernel = np.asarray(model.delta["default"].magnitude[...]) * V / c + down @ up
    assert relative_error(both(jnp.asarray(X)), X @ kernel + np.asarray(layer.bias[...])) <= 1e-5
    assert relative_error(merge(both)[0].kernel[...], kernel) <= 1e-6


def test_lora_fix_trains_the_output_factor_alone():
    layer, model, adapter = layer_with(LoRAFix(rank=2))
    assert isinstance(model.delta["default"].down, AdapterConstant)
    found, _ = gradients(model, adapter)
    assert found.keys() == {"up"}
    graphdef, trainable, frozen = nnx.split(model, adapter.trainable, ...)
    optimizer, before = optax.adam(0.1), {**parameters(model), **adapter_arrays(model)}
    state = optimizer.init(trainable)
    loss = lambda trainable: jnp.sum(nnx.merge(graphdef, trainable, frozen)(jnp.asarray(X)) * DY)  # noqa: E731
    for _ in range(3):
        with jax.numpy_dtype_promotion("standard"):
            moves, state = optimizer.update(jax.grad(loss)(trainable), state)
        trainable = optax.apply_updates(trainable, moves)
    after = nnx.merge(graphdef, trainable, frozen)
    after = {**parameters(after), **adapter_arrays(after)}
    assert {path for path in after if not same_bits(after[path], before[path])} == {"delta/default/up"}
    assert same_bits(layer.kernel[...], after["kernel"])
    # Adam has two moments of the trained factor, and a counter.
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * 4 * 2 + 1
