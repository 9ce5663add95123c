"""Check that a trained adapter of every method can be merged, saved and loaded."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from surm_jax.errors import UserError
from surm_jax.peft import (
    iter_parts,
    load_adapter,
    merge,
    save_adapter,
)
from tests.peft.cases import (
    ADDED,
    BRANCHES,
    CASES,
    EVERY,
    EVERY_UPDATE,
    OURS,
    UPDATES,
    changes,
    fresh,
    is_quick,
    trained,
)
from tests.peft.methods.test_contract import SELECTED, head_of, selected
from tests.peft.models import (
    CONFIG,
    MODELS,
    TENSORS,
    TOLERANCES,
    adapter_arrays,
    base,
    inputs,
    materialize,
    parameters,
    perturb,
    relative_error,
    run,
    same_bits,
    trainable_paths,
)
from tests.speeds import fast

# Merging


@pytest.mark.parametrize(("name", "method"), fast(EVERY_UPDATE, where=is_quick, unpack=True))
def test_merging(name, method):
    model, _ = trained(name, method)
    structure, before = nnx.graphdef(model), {**parameters(model), **adapter_arrays(model)}
    merged, deviation = merge(model)
    assert nnx.graphdef(merged) == nnx.graphdef(base(name))
    expected = {path: type(module) for path, module in nnx.iter_modules(base(name))}
    assert {path: type(module) for path, module in nnx.iter_modules(merged)} == expected
    x, tolerance = inputs(name), TOLERANCES[MODELS[name].precision]
    assert relative_error(run(merged, x), run(model, x)) <= tolerance

    # Only the kernels of adapted layers change, by the expected amount.
    after, added, largest = parameters(merged), changes(name, method, model), 0.0
    for path, array in after.items():
        layer = path.removesuffix("kernel").removesuffix("/")
        if path.endswith("kernel") and layer in added:
            exact = before[path].astype(np.float64) + added[layer].reshape(array.shape)
            # The error is at most half a unit in the last place of the kernel's dtype, plus the rounding of the update.
            error = float(jnp.finfo(array.dtype).eps) / 2 + 2e-6
            np.testing.assert_allclose(array.astype(np.float64), exact, rtol=error, atol=2e-6)
            largest = max(largest, np.abs(array.astype(np.float64) - exact).max())
        else:
            assert same_bits(array, before[path]), path
    # `merge` sums the update after it is computed in float32. This test computes the update in float64.
    assert (deviation > 0 or method == "dora") and deviation == pytest.approx(largest, rel=1e-3, abs=2e-6)

    # The adapted model is unchanged. Merging a merged model changes nothing.
    assert nnx.graphdef(model) == structure
    assert all(same_bits(a, before[path]) for path, a in {**parameters(model), **adapter_arrays(model)}.items())
    twice, deviation = merge(merged)
    assert deviation == 0.0 and nnx.graphdef(twice) == nnx.graphdef(merged)
    assert all(same_bits(array, after[path]) for path, array in parameters(twice).items())


@pytest.mark.parametrize("method", fast(UPDATES, where=is_quick))
def test_merging_a_fresh_adapter_gives_the_base(method):
    merged, deviation = merge(fresh("mlp", method)[0])
    # DoRA divides the columns by their norms, which rounds once.
    assert deviation <= (1e-6 if method == "dora" else 0.0)
    for path, array in parameters(base("mlp")).items():
        np.testing.assert_allclose(parameters(merged)[path], array, rtol=3e-7 if method == "dora" else 0)


@pytest.mark.parametrize("method", fast(BRANCHES, where=is_quick))
def test_branches_cannot_be_merged(method):
    model, _ = trained("mlp", method)
    place = min(CASES[method].places("mlp"))
    with pytest.raises(
        UserError,
        match=rf"^{place} has a part of the adapter 'default' that is added to the output .* not linear",
    ):
        merge(model)


@pytest.mark.parametrize("name", OURS)
def test_a_selection_has_nothing_to_merge(name):
    model, adapter = selected(name, "bitfit")
    moved = perturb(model, adapter)
    merged, deviation = merge(moved)
    assert deviation == 0.0
    assert all(same_bits(array, parameters(moved)[path]) for path, array in parameters(merged).items())


# Files


@pytest.mark.parametrize(("name", "method"), fast(EVERY, where=is_quick, unpack=True))
def test_saving_and_loading(name, method, tmp_path):
    model, adapter = trained(name, method)
    size = save_adapter(tmp_path / "one", model, adapter)
    original = materialize(MODELS[name].make)
    structure, before = nnx.graphdef(original), parameters(original)
    loaded, recipe = load_adapter(tmp_path / "one", original)
    assert nnx.graphdef(original) == structure
    assert all(same_bits(array, before[path]) for path, array in parameters(original).items())
    assert recipe == adapter
    y = run(loaded, inputs(name))
    assert_same(method, y, run(model, inputs(name)))
    assert not same_bits(y, run(base(name), inputs(name)))

    save_adapter(tmp_path / "two", loaded, recipe)
    for file in (CONFIG, TENSORS):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert size == sum(path.stat().st_size for path in (tmp_path / "one").iterdir())

    with safe_open(tmp_path / "one" / TENSORS, framework="numpy") as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    case = CASES[method]
    expected = {
        f"{path}/{case.slot}/{array}".removeprefix("/"): shape
        for path, sizes in case.places(name).items()
        for array, shape in case.stored(*sizes).items()
    }
    assert found == expected | {path: parameters(model)[path].shape for path in head_of(name)}


@pytest.mark.parametrize(("name", "method"), fast(SELECTED, where=is_quick, unpack=True))
def test_saving_and_loading_a_selection(name, method, tmp_path):
    model, adapter = selected(name, method)
    model = perturb(model, adapter)
    save_adapter(tmp_path / "one", model, adapter)
    loaded, recipe = load_adapter(tmp_path / "one", base(name))
    assert recipe == adapter
    assert all(same_bits(array, parameters(model)[path]) for path, array in parameters(loaded).items())
    with safe_open(tmp_path / "one" / TENSORS, framework="numpy") as file:
        assert set(file.keys()) == trainable_paths(model, adapter)


def assert_same(method, y, expected):
    """Check that two outputs have the same bits, or differ only by rounding for some methods.

    These store a matrix product `U V`, which compiled programs may sum in different orders.
    """
    if method in ("lokr", "kadaptation", "compacter"):
        assert relative_error(y, expected) <= (1e-6 if y.dtype == jnp.float32 else TOLERANCES["bfloat16"])
    else:
        assert same_bits(y, expected)


@pytest.mark.parametrize("method", fast(ADDED, where=is_quick))
def test_the_fused_form_computes_the_same(method):
    model = nnx.clone(trained("mlp", method)[0])
    plain = run(model, inputs("mlp"))
    for _, _, part, _ in iter_parts(model):
        part.compact()
    assert_same(method, run(model, inputs("mlp")), plain)
