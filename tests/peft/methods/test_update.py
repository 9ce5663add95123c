"""Test updates of some blocks of a packed kernel, such as one that holds the kernels of query, key and value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft import (
    CirculantUpdate,
    Rule,
    adapt,
    describe,
    iter_parts,
    load_adapter,
    merge,
    save_adapter,
)
from tests.peft.cases import UPDATES, is_quick
from tests.peft.models import adapter_arrays, materialize, parameters, part_arrays, perturb, relative_error, same_bits
from tests.speeds import fast

X = np.random.default_rng(0).normal(size=(2, 3, 6)).astype(np.float32)
FUSED = {
    "linear": lambda: nnx.Linear(6, 12, rngs=nnx.Rngs(0)),
    "heads": lambda: nnx.LinearGeneral(6, (3, 2, 2), rngs=nnx.Rngs(0)),
}
# DoRA rescales the columns of the whole kernel, and has a test of its own.
ADDITIVE = [name for name, case in UPDATES.items() if name != "dora" and case.method.takes_packed]


def fused_and_apart(kind, method, which=(0, 2)):
    """Return a layer whose kernel packs three blocks, its adapter, and three separate layers with the same values.

    The adapter updates the blocks in `which`. The separate layers have the same kernels, biases and updates.
    """
    fused = nnx.Dict(qkv=materialize(FUSED[kind]))
    model, adapter = adapt(fused, [Rule("qkv", UPDATES[method].method, parts=3, which=which)], rngs=nnx.Rngs(1))
    model = perturb(model, adapter)
    kernel, bias = fused.qkv.kernel[...].reshape(6, 12), fused.qkv.bias[...].reshape(12)
    layers = nnx.Dict()
    for part in range(3):
        layer = layers[str(part)] = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
        layer.kernel[...], layer.bias[...] = kernel[:, 4 * part : 4 * part + 4], bias[4 * part : 4 * part + 4]
    numbers = which or range(3)
    apart, _ = adapt(layers, [Rule("|".join(map(str, numbers)), UPDATES[method].method)], rngs=nnx.Rngs(2))
    arrays = part_arrays(model, "qkv", "delta")
    for place, part in enumerate(numbers):
        prefix = f"terms_{place}_matrix_" if len(numbers) > 1 else "matrix_"
        delta = apart[str(part)].delta["default"]
        for name in delta.names:
            getattr(delta, name)[...] = jnp.asarray(arrays[prefix + name], jnp.float32)
    return model, adapter, apart


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("method", fast(["circulant", "c3a", "lora", "lora_fix", "kronecker"], where=is_quick))
def test_parts_of_a_fused_kernel_are_what_layers_apart_are(kind, method):
    model, _, apart = fused_and_apart(kind, method)
    assert [path for path, *_ in iter_parts(apart)] == ["0", "2"]
    expected = np.concatenate([apart[str(part)](jnp.asarray(X)) for part in range(3)], axis=-1)
    y = model.qkv(jnp.asarray(X))
    assert relative_error(np.asarray(y).reshape(2, 3, 12), expected) <= 1e-5
    merged, _ = merge(model)
    assert relative_error(np.asarray(merged.qkv(jnp.asarray(X))).reshape(2, 3, 12), expected) <= 1e-5


@pytest.mark.parametrize("method", fast(ADDITIVE, where=is_quick))
def test_the_parts_that_are_not_named_do_not_move(method):
    for which in ((1,), (0, 2)):
        model, _, _ = fused_and_apart("linear", method, which)
        before = parameters(model)["qkv/kernel"]
        after = parameters(merge(model)[0])["qkv/kernel"]
        for part in range(3):
            block = slice(4 * part, 4 * part + 4)
            assert same_bits(after[:, block], before[:, block]) is (part not in which)


@pytest.mark.parametrize("which", [(), (2, 0), (1,)])
def test_which_parts(which):
    model, _, apart = fused_and_apart("linear", "lora", which)
    expected = np.concatenate([apart[str(part)](jnp.asarray(X)) for part in range(3)], axis=-1)
    assert relative_error(model.qkv(jnp.asarray(X)), expected) <= 1e-5


def test_each_part_starts_at_its_own_random_numbers():
    layer = nnx.Dict(qkv=materialize(FUSED["linear"]))
    model, _ = adapt(layer, [Rule("qkv", UPDATES["circulant"].method, parts=3)], rngs=nnx.Rngs(1))
    assert same_bits(model.qkv(jnp.asarray(X)), layer.qkv(jnp.asarray(X)))
    starts = [array.tobytes() for path, array in adapter_arrays(model).items() if path.endswith("r2")]
    assert len(set(starts)) == 3


@pytest.mark.parametrize("method", fast([*ADDITIVE, "dora"], where=is_quick))
def test_files(method, tmp_path):
    model, adapter, _ = fused_and_apart("heads", method)
    save_adapter(tmp_path / "adapter", model, adapter)
    loaded, recipe = load_adapter(tmp_path / "adapter", nnx.Dict(qkv=materialize(FUSED["heads"])))
    assert recipe == adapter and (recipe.rules[0].parts, recipe.rules[0].which) == (3, (0, 2))
    assert same_bits(loaded.qkv(jnp.asarray(X)), model.qkv(jnp.asarray(X)))


def test_dora_normalises_all_columns():
    model, _, _ = fused_and_apart("linear", "dora", (1,))
    arrays, W = part_arrays(model, "qkv", "delta"), parameters(model)["qkv/kernel"].astype(np.float64)
    moved = W.copy()
    moved[:, 4:8] += 0.3 * arrays["matrix_down"] @ arrays["matrix_up"]
    kernel = arrays["magnitude"] * moved / np.linalg.norm(moved, axis=0)
    assert relative_error(model.qkv(jnp.asarray(X)), X @ kernel + parameters(model)["qkv/bias"]) <= 1e-5


def test_the_constant_factor_of_a_part_is_not_trained():
    model, adapter, _ = fused_and_apart("linear", "lora_fix")
    _, trainable, _ = nnx.split(model, adapter.trainable, ...)
    assert {path[-1] for path, _ in nnx.to_flat_state(trainable)} == {"terms_0_matrix_up", "terms_1_matrix_up"}


def test_an_abstract_model_and_its_counts():
    def make():
        layer = nnx.Dict(qkv=nnx.Linear(768, 3 * 768, rngs=nnx.Rngs(0)))
        return adapt(layer, [Rule("qkv", UPDATES["circulant"].method, parts=3, which=(0, 2))], rngs=nnx.Rngs(1))[0]

    model = nnx.eval_shape(make)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model)))
    row = describe(model).rows[0]
    assert (row.path, row.shape, row.trainable) == ("qkv", (768, 2304), 2 * 2 * 768)


def test_features_that_are_not_so_many_parts():
    with pytest.raises(
        UserError, match=r"^qkv cannot be adapted: its 12 output features cannot be divided into 5 equal parts"
    ):
        adapt(
            nnx.Dict(qkv=materialize(FUSED["linear"])),
            [Rule("qkv", UPDATES["lora"].method, parts=5)],
            rngs=nnx.Rngs(1),
        )


@pytest.mark.parametrize(("parts", "which"), [(2.5, ()), (3, (0, 1.0)), (True, (0,)), (2, ("0",)), (3, 0)])
def test_parts_are_whole_numbers(parts, which):
    with pytest.raises(UserError, match="must have whole numbers in `parts` and `which`"):
        Rule("qkv", CirculantUpdate(), parts, which)
    assert Rule("qkv", CirculantUpdate(), 3, [0, 2]) == Rule("qkv", CirculantUpdate(), 3, (0, 2))
