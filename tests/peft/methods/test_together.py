"""Test all methods as adapters of one model, each under its own name, on ViT and BERT.

One compiled program contains all methods, because one program for each would take minutes to compile. A mistake in one
method changes the sum of all that they add. `test_contract.py` tests each method separately.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.peft import Adapter, AdapterParam, adapt, iter_parts, load_adapter, save_adapter
from tests.peft.cases import ADDED, OURS, bare, expected_output
from tests.peft.methods.test_contract import two_steps
from tests.peft.models import (
    TOLERANCES,
    adapter_arrays,
    base,
    inputs,
    parameters,
    perturb,
    relative_error,
    run,
    same_bits,
    trainable_paths,
)

# A program with twenty methods takes long to compile.
pytestmark = pytest.mark.exhaustive


class _All:
    """In place of an `Adapter`: its filter selects the trained parameters of all adapters."""

    trainable = AdapterParam


@functools.cache
def fresh(name: str) -> tuple[nnx.Module, dict[str, Adapter]]:
    """Return a model with an adapter of every method that adapts one of its modules, and the adapters by method."""
    model, adapters = base(name), {}
    for number, (method, case) in enumerate(ADDED.items()):
        if case.places(name):
            model, adapters[method] = adapt(model, [case.rule(name)], name=method, rngs=nnx.Rngs(number))
    return model, adapters


@functools.cache
def trained(name: str) -> nnx.Module:
    return perturb(fresh(name)[0], _All)


@pytest.mark.parametrize("name", OURS)
def test_every_method_is_in_it_where_its_rule_says(name):
    model, adapters = fresh(name)
    # These models have only one block, to which AdapterDrop adds nothing.
    assert ADDED.keys() - adapters.keys() == {"adapter_drop"}
    found = {}
    for path, method, *_ in iter_parts(model):
        found.setdefault(method, []).append(path)
    assert found == {method: sorted(ADDED[method].places(name)) for method in adapters}
    for method, adapter in adapters.items():
        mine = {path for path in adapter_arrays(model) if f"/{method}/" in path}
        constant = {path for path in mine if path.rpartition("/")[2] in ADDED[method].constant}
        assert trainable_paths(model, adapter) == mine - constant


@pytest.mark.parametrize("name", OURS)
def test_they_start_at_the_base_to_the_bit(name):
    assert same_bits(fresh(name)[0](inputs(name)), base(name)(inputs(name)))


@pytest.mark.parametrize("name", OURS)
def test_they_sum_as_the_oracles_do(name):
    model, x = trained(name), inputs(name)
    y = run(model, x)
    assert relative_error(y, base(name)(x)) > 0.1
    expected = expected_output(name, {method: method for method in fresh(name)[1]}, model, x)
    assert relative_error(y, expected) <= TOLERANCES["float32"]


@pytest.mark.parametrize("name", OURS)
def test_each_of_them_counts_and_can_be_switched_off(name):
    model, x = nnx.clone(trained(name)), inputs(name)
    parts = {}
    for _, method, part, _ in iter_parts(model):
        parts.setdefault(method, []).append(part)
    whole = run(model, x)
    for method in parts:
        for part in parts[method]:
            part.scale[...] = jnp.zeros(())
        assert relative_error(run(model, x), whole) > 10 * TOLERANCES["float32"], method
        for part in parts[method]:
            part.scale[...] = jnp.ones(())
    assert same_bits(run(model, x), whole)
    for part in (part for method in parts for part in parts[method]):
        part.scale[...] = jnp.zeros(())
    assert same_bits(model(x), bare(name, model)(x))


@pytest.mark.parametrize("name", OURS)
def test_everything_that_is_trained_moves_within_two_steps_and_nothing_else(name):
    model, adapters = fresh(name)
    after, first = two_steps(model, _All, inputs(name))
    before, after = ({**parameters(m), **adapter_arrays(m)} for m in (model, after))
    assert first.keys() == set().union(*(trainable_paths(model, adapter) for adapter in adapters.values()))
    assert before.keys() == after.keys()
    for path, array in after.items():
        assert same_bits(array, before[path]) is (path not in first), path
    for method in adapters:
        case = ADDED[method]
        for path in first:
            if key := path.partition(f"/{case.slot}/{method}/")[2]:
                learns = key in case.early or (key in case.zero and key not in getattr(case, "late", ()))
                assert bool(first[path].any()) is learns, f"the first gradient of {path}"


@pytest.mark.parametrize("name", OURS)
def test_each_is_saved_and_loaded_by_itself(name, tmp_path):
    model, loaded = trained(name), base(name)
    for method, adapter in fresh(name)[1].items():
        save_adapter(tmp_path / method, model, adapter)
        loaded, recipe = load_adapter(tmp_path / method, loaded, name=method)
        assert recipe == adapter
        save_adapter(tmp_path / "again", loaded, recipe)
        for file in (tmp_path / method).iterdir():
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert relative_error(run(loaded, inputs(name)), run(model, inputs(name))) <= 1e-6


@pytest.mark.parametrize("name", OURS)
def test_dropout(name):
    model, x = trained(name), inputs(name)
    once = run(model, x, jax.random.key(0))
    assert relative_error(once, run(model, x)) > 0.01
    assert same_bits(run(model, x, jax.random.key(0)), once)
    assert relative_error(run(model, x, jax.random.key(1)), once) > 0.01
    assert np.isfinite(once).all()
