"""Check that an update of every method works in every kind of kernel."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft import (
    DoRA,
    LoRA,
    Rule,
    adapt,
    convert,
    delete,
    describe,
    iter_parts,
    kernel_change,
    load_adapter,
    merge,
    register_kernel,
    save_adapter,
    set_scale,
    train_only,
)
from tests.peft.cases import UPDATES
from tests.peft.kernels.kinds import KINDS, Experts, Reader, Stranger
from tests.peft.models import TOLERANCES, perturb, relative_error, same_bits

QUICK = {("linear", "lora"), ("einsum", "circulant"), ("conv", "lora"), ("conv_groups", "dora"),
         ("stranger", "circulant"), ("experts", "lora"), ("projection", "dora"),
         ("embed", "lora"), ("embed_tied", "dora"), ("einsum_batch", "dora"), ("general_batch", "lora"),
         ("stacked", "circulant"), ("stacked_einsum", "dora")}  # fmt: skip
METHODS = sorted(UPDATES)
# Every kind with a method of each kind of part, and every method with a stack of kernels that are no matrices.
PAIRS = {*itertools.product(KINDS, ("circulant", "dora", "lora")), *itertools.product(("stacked_einsum",), METHODS)}
EVERY = [
    pytest.param(kind, method, marks=[] if (kind, method) in QUICK else pytest.mark.exhaustive)
    for kind, method in sorted(PAIRS | QUICK)
]


def method_for(kind, method):
    """Return a method, without dropout and with settings that fit the small matrices."""
    cls = type(UPDATES[method].method)
    settings = {"c3a": {"block": 1}, "kadaptation": {"terms": 2}}.get(method, {})
    if "rank" in {field.name for field in dataclasses.fields(cls)}:
        settings = settings | {"rank": 2}
    return cls(**settings)


@functools.cache
def adapted(kind, method):
    return adapt(KINDS[kind].module(), [KINDS[kind].rule(method_for(kind, method))], rngs=nnx.Rngs(1))


def dense(model):
    """Return the change of the kernel as a matrix or stack of matrices."""
    (row,) = iter_parts(model)
    return kernel_change(row)


def same(case, left, right):
    """Return whether two outputs have the same bits, or nearly so for a scan, which is always compiled."""
    return same_bits(left, right) or ("scan" in case.call.__name__ and relative_error(left, right) < 1e-6)


def by_oracle(case, module, change, x):
    """Return the output of the plain module with a matrix added to its kernel."""
    plain = nnx.merge(*nnx.split(module), copy=True)
    variable = getattr(plain, case.parameter)
    variable.set_value(variable[...] + case.place(change))
    return case.call(plain, x)


@pytest.mark.parametrize(("kind", "method"), EVERY)
def test_the_start_the_values_and_the_gradients(kind, method):
    case = KINDS[kind]
    module, x = case.module(), case.x()
    model, adapter = adapted(kind, method)
    assert same(case, case.call(model, x), case.call(module, x))
    assert dense(model).shape == case.matrix
    model = perturb(model, adapter)
    graphdef, trainable, frozen = nnx.split(model, adapter.trainable, ...)

    def loss(y):
        return jnp.sum(jnp.sin(3 * y) * jnp.linspace(1, 2, y.size).reshape(y.shape))

    def ours(trainable):
        return loss(case.call(nnx.merge(graphdef, trainable, frozen, copy=True), x))

    def theirs(trainable):
        return loss(by_oracle(case, module, dense(nnx.merge(graphdef, trainable, frozen)), x))

    y = case.call(model, x)
    assert relative_error(y, by_oracle(case, module, dense(model), x)) <= TOLERANCES["float32"]
    assert relative_error(y, case.call(module, x)) > 1e-3
    found, expected = (jax.tree.leaves(jax.jit(jax.grad(f))(trainable)) for f in (ours, theirs))
    for mine, other in zip(found, expected, strict=True):
        assert np.abs(other).max() > 0
        assert np.abs(np.asarray(mine - other)).max() <= 1e-4 * np.abs(other).max() + 1e-5


@pytest.mark.parametrize(("kind", "method"), EVERY)
def test_saving_merging_and_describing(kind, method, tmp_path):
    case = KINDS[kind]
    module, x = case.module(), case.x()
    model, adapter = adapted(kind, method)
    model = perturb(model, adapter)
    save_adapter(tmp_path / "adapter", model, adapter)
    loaded, _ = load_adapter(tmp_path / "adapter", module)
    assert same_bits(case.call(loaded, x), case.call(model, x))
    merged, deviation = merge(model)
    assert nnx.graphdef(merged) == nnx.graphdef(module) and deviation < 1e-6
    assert relative_error(case.call(merged, x), case.call(model, x)) <= TOLERANCES["float32"]
    assert same_bits(case.call(delete(model, adapter), x), case.call(module, x))
    assert same(case, case.call(set_scale(model, adapter, 0.0), x), case.call(module, x))
    description = describe(model, adapter)
    (row,) = description.rows
    assert row.shape == case.matrix
    lead = int(np.prod(case.matrix[:-2]))
    # As many parameters as separate layers with one matrix each.
    layer = nnx.Linear(*case.matrix[-2:], rngs=nnx.Rngs(0))
    one = describe(*adapt(layer, [Rule("", method_for(kind, method))], rngs=nnx.Rngs(1)))
    assert description.trainable == lead * one.trainable


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimiser_for_the_adapter_alone(kind):
    case = KINDS[kind]
    model, _ = adapted(kind, "lora")
    tree = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    updates = train_only(optax.sgd(1.0), ["delta/.*"])
    moved, _ = updates.update(jax.tree.map(jnp.ones_like, tree), updates.init(tree))
    assert not moved[case.parameter].any() and all(leaf.all() for leaf in jax.tree.leaves(moved["delta"]))


@pytest.mark.parametrize("kind", ["einsum_fused", pytest.param("stacked_einsum", marks=pytest.mark.exhaustive)])
def test_converting_is_exact_where_the_rank_suffices(kind):
    case, x = KINDS[kind], KINDS[kind].x()
    model, adapter = adapted(kind, "circulant")
    model = perturb(model, adapter)
    other, _, errors = convert(model, adapter, type(UPDATES["lora"].method)(rank=min(case.matrix[-2:])))
    assert errors[""] < 1e-5
    assert relative_error(case.call(other, x), case.call(model, x)) < 1e-4


@pytest.mark.parametrize("kind", ["conv", "conv_causal"])
def test_patches_and_one_convolution_give_the_same(kind):
    case, x = KINDS[kind], KINDS[kind].x()
    model, adapter = adapted(kind, "circulant")
    model = perturb(model, adapter)
    for execution in ("fft", "dense", "fused"):
        other, _ = adapt(case.module(), adapter.rules, execution=execution, rngs=nnx.Rngs(0))
        nnx.update(other, nnx.state(model))
        assert relative_error(other(x), model(x)) <= TOLERANCES["float32"]


def test_a_table_of_embeddings_gives_what_its_class_gives_for_unusual_numbers():
    model, adapter = adapted("embed", "lora")
    model = perturb(model, adapter)
    rows = model(jnp.arange(6))
    np.testing.assert_array_equal(model(jnp.array([-1, 2])), rows[jnp.array([5, 2])])
    assert np.isnan(model(jnp.array([6]))).all()


def test_a_rule_with_parts_gives_each_part_of_a_fused_kernel_its_own_matrix():
    case = KINDS["einsum_fused"]
    model, adapter = adapt(case.module(), [Rule("", DoRA(), parts=3, which=[0, 2])], rngs=nnx.Rngs(1))
    model = perturb(model, adapter)
    change, x = dense(model), case.x()
    updated = model(x) - case.module()(x)
    assert np.abs(updated[0]).max() > 1e-3 and np.abs(updated[2]).max() > 1e-3
    assert change.shape == (6, 12)


def test_updates_at_a_parameter_that_cannot_act_are_refused():
    half = nnx.Dict(reader=Reader(6, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    for model, rule, message in (
        (half, Rule("reader/kernel", LoRA()), "reader/kernel .* in bfloat16 would round the update away"),
        (Experts(nnx.Rngs(0)), Rule("up", LoRA()), "up .* does not say which axes are rows and columns"),
        (Stranger(nnx.Rngs(0)), Rule("", LoRA(dropout=0.1)), "dropout=0.1 needs the input of the product"),
        (nnx.Linear(4, 4, rngs=nnx.Rngs(0)), Rule("", LoRA(), axes="oi"), "its rule needs no axes"),
        (Stranger(nnx.Rngs(0)), Rule("weight", LoRA()), "'weight' matches no layer with a kernel"),
    ):
        with pytest.raises(UserError, match=message):
            adapt(model, [rule], rngs=nnx.Rngs(1))
    for axes in ("ox", "bi", "oo"):
        with pytest.raises(UserError, match="axes must have a letter for each axis"):
            Rule("up", LoRA(), axes=axes)
    with pytest.raises(UserError, match="register_kernel needs a class of nnx modules"):
        register_kernel(Experts(nnx.Rngs(0)))


def test_the_price_of_an_update_at_a_parameter_is_printed():
    model, adapter = adapted("stranger", "lora")
    assert "LowRank at the parameter" in str(describe(model, adapter))
    assert "forms the whole sum W + M in every call" in str(describe(model, adapter))
    assert "the parameter" not in str(describe(*adapted("linear", "lora")))


def test_two_parameters_of_a_module_and_two_adapters_of_a_parameter():
    module = nnx.LoRA(6, 2, 4, rngs=nnx.Rngs(0))
    x = KINDS["linear"].x()
    model, first = adapt(module, [Rule("lora_[ab]", LoRA())], rngs=nnx.Rngs(1))
    model, second = adapt(model, [Rule("lora_a", DoRA())], name="second", rngs=nnx.Rngs(2))
    assert same_bits(model(x), module(x))
    assert [(row.path, row.name) for row in iter_parts(model)] == [
        ("lora_a", "default"), ("lora_a", "second"), ("lora_b", "default")
    ]  # fmt: skip
    model = perturb(perturb(model, first), second)
    merged, _ = merge(model)
    assert relative_error(merged(x), model(x)) <= TOLERANCES["float32"] < relative_error(model(x), module(x))


def test_a_base_under_another_lora_and_an_attention_are_adapted():
    x = KINDS["linear"].x()
    under = nnx.LoRA(6, 2, 4, base_module=nnx.Linear(6, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(2))
    for module, target in ((under, "base_module"), (attention, "query|out")):
        model, adapter = adapt(module, [Rule(target, LoRA())], rngs=nnx.Rngs(3))
        assert same_bits(model(x), module(x))
        model = perturb(model, adapter)
        assert relative_error(merge(model)[0](x), model(x)) <= TOLERANCES["float32"]


def test_a_masked_kernel_is_adapted_at_the_parameter():
    mask = np.tril(np.ones((3, 2, 4), np.float32))
    module, x = nnx.Conv(2, 4, (3,), mask=mask, rngs=nnx.Rngs(0)), jnp.ones((2, 5, 2))
    with pytest.raises(UserError, match="its kernel is multiplied by a mask: name the parameter"):
        adapt(module, [Rule("", LoRA())], rngs=nnx.Rngs(1))
    model, _ = adapt(module, [Rule("kernel", LoRA(), axes="iio")], rngs=nnx.Rngs(1))
    assert same_bits(model(x), module(x))
    model.delta["default"]["kernel"].up[...] = jnp.ones((1, 4))
    merged, _ = merge(model)
    assert relative_error(merged(x), model(x)) <= TOLERANCES["float32"] < relative_error(model(x), module(x))
