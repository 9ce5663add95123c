"""Test updates that are computed entry by entry: their derivatives, and what they store for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft import LoRA, Rule, adapt, convert, merge, save_peft
from tests.peft.cases import UPDATES
from tests.peft.models import by_path, part_arrays, perturb, relative_error, run
from tests.speeds import fast

METHODS = ("hira", "modulated", "smoa", "sine_lora", "lr_lora")
M, N = 10, 6
X = np.random.default_rng(0).normal(size=(3, M))


def layer(method, dtype=jnp.float32):
    linear = nnx.Linear(M, N, param_dtype=dtype, dtype=dtype, rngs=nnx.Rngs(0))
    model, adapter = adapt(nnx.Dict(body=linear), [Rule("body", UPDATES[method].method)], rngs=nnx.Rngs(1))
    return perturb(model, adapter), adapter


@pytest.mark.parametrize("method", fast(METHODS, "hira"))
def test_no_array_of_the_size_of_the_kernel_is_kept_for_the_backward_pass(method):
    model, _ = layer(method)
    part, kernel = model.body.delta["default"], model.body.kernel[...]
    graphdef, state = nnx.split(part)
    x = jnp.asarray(X, jnp.float32)

    def added(x, state):
        return nnx.merge(graphdef, state).added(x, jnp.zeros((3, N)), kernel, jnp.matmul)

    _, backward = jax.vjp(added, x, state)
    kept = [leaf for leaf in jax.tree.leaves(backward) if np.shape(leaf) == (M, N)]
    assert len(kept) <= 1 and all(np.array_equal(leaf, kernel) for leaf in kept)


@pytest.mark.parametrize("method", fast(METHODS, "hira", "lr_lora"))
def test_derivatives_by_the_input_and_by_all_arrays(method):
    """Compare with central differences of the expected result (NumPy, float64)."""
    model, adapter = layer(method)
    graphdef, trained, frozen = nnx.split(model, adapter.trainable, ...)
    weights = np.random.default_rng(1).normal(size=(3, N))

    def loss(trained, x):
        return jnp.sum(nnx.merge(graphdef, trained, frozen).body(x) * jnp.asarray(weights, jnp.float32))

    slopes, by_x = jax.grad(loss, argnums=(0, 1))(trained, jnp.asarray(X, jnp.float32))
    kernel = np.asarray(model.body.kernel[...], np.float64)
    every = {path.rpartition("/")[2]: np.asarray(v[...], np.float64) for path, v in by_path(trained).items()}
    case = UPDATES[method]
    change = case.change(case.method.alpha, every, kernel)
    assert relative_error(by_x, weights @ (kernel + change).T) < 1e-5
    for path, slope in by_path(slopes).items():
        name, rng = path.rpartition("/")[2], np.random.default_rng(2)
        direction = rng.normal(size=every[name].shape)
        ends = [
            case.change(case.method.alpha, every | {name: every[name] + e * direction}, kernel) for e in (1e-5, -1e-5)
        ]
        expected = np.sum(X @ (ends[0] - ends[1]) / 2e-5 * weights)
        assert float(np.sum(np.asarray(slope[...]) * direction)) == pytest.approx(expected, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("method", ["hira", "lr_lora", "abba"])
def test_the_rows_of_an_embedding_are_those_of_the_oracle(method):
    table = nnx.Embed(M, N, rngs=nnx.Rngs(0))
    model, adapter = adapt(nnx.Dict(body=table), [Rule("body", UPDATES[method].method)], rngs=nnx.Rngs(1))
    model, ids = perturb(model, adapter), jnp.array([[1, 0], [9, 1]])
    kernel = np.asarray(table.embedding[...], np.float64)
    change = UPDATES[method].change(UPDATES[method].method.alpha, part_arrays(model, "body", "delta"), kernel)
    assert relative_error(model.body(ids), (kernel + change)[np.asarray(ids)]) < 1e-5
    merged, _ = merge(model)
    assert relative_error(merged.body(ids), model.body(ids)) < 1e-5


def test_what_reads_the_kernel_stays_beside_it():
    model, _ = layer("hira")
    both, _ = adapt(model, [Rule("body", LoRA())], name="other", rngs=nnx.Rngs(2))
    with pytest.raises(UserError, match="body has a part of the adapter 'default' that depends on the kernel"):
        merge(both, ["other"])


@pytest.mark.parametrize(("method", "kind"), [("hira", r"W \* LowRank"), ("lr_lora", r"phi\(LowRank\)")])
def test_what_cannot_hold_them_is_refused(method, kind):
    model, adapter = layer(method)
    dense, recipe, errors = convert(model, adapter, LoRA(rank=N))
    assert max(errors.values()) < 1e-5
    assert relative_error(run(dense.body, jnp.asarray(X, "float32")), run(model.body, jnp.asarray(X, "float32"))) < 1e-5
    with pytest.raises(UserError, match=rf"body cannot become {method}: its update {kind} is computed entry by entry"):
        convert(dense, recipe, UPDATES[method].method)
    with pytest.raises(UserError, match=rf"the part of body is {kind}, not a multiple of one matrix"):
        save_peft("nowhere", model, adapter, None)
