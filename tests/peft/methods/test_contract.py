"""Check what every method must satisfy, at its start and after some training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.peft import (
    METHODS,
    AdapterConstant,
    Branch,
    Rule,
    Selection,
    Update,
    adapt,
    adapter_dropout,
    iter_parts,
    merge,
)
from surm_jax.peft.owners import release
from surm_jax.peft.parts.dropout import drop
from tests.peft.cases import (
    ADDED,
    BRANCHES,
    CASES,
    EVERY,
    OURS,
    SELECTIONS,
    UPDATES,
    bare,
    expected_output,
    fresh,
    is_quick,
    is_small,
    trained,
)
from tests.peft.models import (
    FAST_TO_COMPILE,
    MODELS,
    TOLERANCES,
    adapter_arrays,
    base,
    by_path,
    inputs,
    parameters,
    part_arrays,
    perturb,
    relative_error,
    run,
    same_bits,
    trainable_paths,
)
from tests.peft.oracles import low_rank
from tests.speeds import fast

SELECTED = [(model, method) for method in SELECTIONS for model in OURS]


def head_of(name):
    return {path for path in parameters(base(name)) if MODELS[name].train and path.startswith("head/")}


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_TO_COMPILE)
def gradient(graphdef, trainable, frozen, x):
    def loss(trainable):
        y = nnx.merge(graphdef, trainable, frozen)(x)
        return jnp.sum(jnp.sin(3 * y.astype("float32")) * jnp.linspace(1, 2, y.size).reshape(y.shape))

    return jax.grad(loss)(trainable)


def two_steps(model, adapter, x, of=None):
    """Make two training steps that move each parameter against the sign of its gradient, as Adam's first step does.

    The second step is shorter, so that it never leads back to the start.

    Args:
        model: The adapted model, which is not changed.
        adapter: The adapter, whose trained variables are changed.
        x: The input.
        of: A filter that selects the variables to differentiate. `None` means those that the adapter trains. With a
            larger selection, several adapters can share one compiled program.

    Returns:
        The model after both steps, and the first gradient by path.
    """
    model, mine, first = nnx.clone(model), trainable_paths(model, adapter), None
    for size in (1e-2, 3e-3):
        graphdef, parts, frozen = nnx.split(model, of or adapter.trainable, ...)
        slopes = by_path(gradient(graphdef, parts, frozen, x))
        slopes = {path: np.asarray(slope[...]) for path, slope in slopes.items() if path in mine}
        first = first or slopes
        for path, v in by_path(parts).items():
            if path in mine:
                v[...] = jnp.asarray(np.asarray(v[...]) - np.asarray(size * np.sign(slopes[path]), v.dtype))
        nnx.update(model, parts)
    return model, first


def selected(name, method, train=True):
    patterns = (*(MODELS[name].train if train else ()), *CASES[method].method.patterns)
    return adapt(base(name), [], train=patterns, rngs=nnx.Rngs(1))


# The cases


def test_every_registered_method_has_a_case():
    assert CASES.keys() == METHODS.keys()
    for cases, kind in ((UPDATES, Update), (BRANCHES, Branch), (SELECTIONS, Selection)):
        assert all(type(case.method) is METHODS[name] and isinstance(case.method, kind) for name, case in cases.items())


@pytest.mark.parametrize("method", CASES)
def test_the_case_has_no_setting_at_its_default(method):
    instance = CASES[method].method
    for field in dataclasses.fields(instance):
        # These two settings have tests of their own.
        if field.name not in ("learn_alpha", "bias"):
            assert getattr(instance, field.name) != field.default, field.name


# The start


@pytest.mark.parametrize(("name", "method"), fast(EVERY, where=is_quick, unpack=True))
def test_a_fresh_adapter_changes_no_bit_of_the_output(name, method):
    # The models are not compiled here, since two different compiled programs may sum in different orders.
    assert same_bits(fresh(name, method)[0](inputs(name)), base(name)(inputs(name)))


@pytest.mark.parametrize(("name", "method"), fast(EVERY, where=is_quick, unpack=True))
def test_parts_are_where_the_rule_says_and_start_as_they_must(name, method):
    model, _ = fresh(name, method)
    case, arrays, everything = CASES[method], adapter_arrays(model), parameters(model)
    assert {array.dtype for array in arrays.values()} == {np.dtype("float32")}
    assert everything.keys() - arrays.keys() == parameters(base(name)).keys()
    assert [path for path, *_ in iter_parts(model)] == sorted(case.places(name))
    for path in case.places(name):
        prefix = f"{path}/{case.slot}/default/".removeprefix("/")
        mine = {p.removeprefix(prefix): arrays.pop(p) for p in list(arrays) if p.startswith(prefix)}
        assert {key for key, array in mine.items() if not array.any()} == case.zero
        assert all(array.all() for key, array in mine.items() if key not in case.zero | case.given)
    assert not arrays


@pytest.mark.parametrize("method", fast(ADDED, where=is_quick))
def test_layers_start_at_different_random_numbers(method):
    arrays = adapter_arrays(fresh("mlp", method)[0])
    arrays = [a.tobytes() for p, a in arrays.items() if a.any() and p.rpartition("/")[2] not in CASES[method].given]
    assert len(set(arrays)) == len(arrays) >= (0 if method in ("c3a", "mora") else len(CASES[method].places("mlp")))


# The output


@pytest.mark.parametrize(("name", "method"), fast(EVERY, where=is_small, unpack=True))
def test_output_is_that_of_the_oracle(name, method):
    model, _ = trained(name, method)
    x = inputs(name)
    y = run(model, x)
    assert relative_error(y, run(bare(name, model), x)) > 100 * TOLERANCES["float32"], (
        "too near to the base to show anything"
    )
    assert relative_error(y, expected_output(name, {"default": method}, model, x)) <= TOLERANCES[MODELS[name].precision]
    assert y.dtype == run(base(name), x).dtype


@pytest.mark.parametrize(("name", "method"), fast(EVERY, where=is_quick, unpack=True))
def test_a_scale_of_zero_is_the_base_to_the_bit(name, method):
    model = nnx.clone(trained(name, method)[0])
    for _, _, part, _ in iter_parts(model):
        part.scale[...] = jnp.zeros(())
    assert same_bits(model(inputs(name)), bare(name, model)(inputs(name)))


@pytest.mark.parametrize("method", fast(ADDED, where=is_quick))
def test_a_scale_between_is_a_part_of_what_is_added(method):
    model = nnx.clone(trained("mlp", method)[0])
    # The output of a single layer is linear in the scale of its part.
    parts = {path: part for path, _, part, _ in iter_parts(model)}
    layer = model.tail.gate
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
    whole = run(layer, x)
    parts["tail/gate"].scale[...] = jnp.zeros(())
    nothing = run(layer, x)
    parts["tail/gate"].scale[...] = jnp.float32(0.3)
    assert relative_error(run(layer, x) - nothing, 0.3 * (whole - nothing)) <= TOLERANCES["float32"]


# What is trained


@pytest.mark.parametrize(("name", "method"), fast(EVERY, where=is_quick, unpack=True))
def test_trainable_are_the_arrays_of_the_adapter_and_the_head(name, method):
    model, adapter = fresh(name, method)
    constant = {p for p in adapter_arrays(model) if p.rpartition("/")[2] in CASES[method].constant}
    assert len(constant) == len(CASES[method].constant) * len(CASES[method].places(name))
    assert trainable_paths(model, adapter) == (adapter_arrays(model).keys() - constant) | head_of(name)
    variables = by_path(nnx.state(model))
    assert all(type(variables[path]) is AdapterConstant for path in constant)


@pytest.mark.parametrize(("name", "method"), fast(SELECTED, where=is_quick, unpack=True))
def test_a_selection_trains_what_it_says(name, method):
    for train in (True, False) if method != "linear_probe" else (True,):
        model, adapter = selected(name, method, train)
        plain = nnx.clone(model)
        release(plain, ["default"])
        assert nnx.graphdef(plain) == nnx.graphdef(base(name))
        chosen = {path for path in parameters(base(name)) if CASES[method].chosen(path)}
        assert chosen or method == "linear_probe"
        assert trainable_paths(model, adapter) == chosen | (head_of(name) if train else set())


@pytest.mark.parametrize(
    ("name", "method"),
    fast([*((n, m) for n, m in EVERY if n in ("mlp", "deep", *OURS)), *SELECTED], where=is_quick, unpack=True),
)
def test_what_is_trained_moves_within_two_steps_and_nothing_else(name, method):
    model, adapter = selected(name, method) if method in SELECTIONS else fresh(name, method)
    after, first = two_steps(model, adapter, inputs(name), nnx.Param if method in SELECTIONS else None)
    before, after = ({**parameters(m), **adapter_arrays(m)} for m in (model, after))
    assert before.keys() == after.keys()
    for path, array in after.items():
        assert array.dtype == before[path].dtype
        assert same_bits(array, before[path]) is (path not in first), path
    assert first.keys() == trainable_paths(model, adapter)
    for path in first.keys() & adapter_arrays(model).keys():
        case, key = CASES[method], path.partition(f"{CASES[method].slot}/default/")[2]
        learns = key in case.early or (key in case.zero and key not in getattr(case, "late", ()))
        assert bool(first[path].any()) is learns, f"the first gradient of {path}"


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("method", ["circulant", "dora", "bottleneck"])
def test_plain_gradients_lower_the_loss_in_graph_and_in_tree_mode(graph, method):
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
        model, adapter = adapt(nnx.clone(base("mlp")), [CASES[method].rule("mlp")], train=["head/.*"], rngs=nnx.Rngs(1))
        graphdef, trainable, frozen = nnx.split(model, adapter.trainable, ...)
        x = inputs("mlp")

        @jax.jit
        def step(trainable, frozen):
            def loss(trainable):
                y = nnx.merge(graphdef, trainable, frozen)(x)
                return jnp.sum((y - jnp.linspace(0, 1, y.size).reshape(y.shape)) ** 2)

            value, gradient = jax.value_and_grad(loss)(trainable)
            return value, jax.tree.map(lambda p, g: p - 0.02 * g, trainable, gradient)

        losses = []
        for _ in range(4):
            value, trainable = step(trainable, frozen)
            losses.append(float(value))
        assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]


# A learned alpha


@pytest.mark.parametrize("method", fast(UPDATES, where=is_quick))
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_a_learned_alpha(method, alpha):
    update = dataclasses.replace(UPDATES[method].method, learn_alpha=True, alpha=alpha)
    layer, x = base("mlp").tail.gate, jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
    model, adapter = adapt(layer, [Rule("", update)], rngs=nnx.Rngs(1))
    assert same_bits(model(x), layer(x))
    after, first = two_steps(model, adapter, x)
    assert "delta/default/alpha" in first and first.keys() == trainable_paths(model, adapter)
    before, arrays = parameters(model), parameters(after)
    assert not any(same_bits(arrays[path], before[path]) for path in first)

    moved = perturb(after, adapter)
    arrays = part_arrays(moved, "", "delta")
    kernel = np.asarray(layer.kernel[...], np.float64)
    change = UPDATES[method].change(float(arrays.pop("alpha")), arrays, kernel)
    assert (
        relative_error(run(moved, x), np.asarray(x) @ (kernel + change) + np.asarray(layer.bias[...]))
        <= TOLERANCES["float32"]
    )
    assert np.abs(change).max() > 1e-3


# Several adapters


@pytest.mark.parametrize("method", fast(ADDED, where=is_quick))
def test_adapters_of_different_names_sum_on_the_same_input(method):
    """Check a model with two adapters of the method and a third one of another method, LoRA or the circulant branch."""
    model, adapters = base("mlp"), []
    third = "lora" if method in UPDATES else "circulant_adapter"
    for name, what in (("default", method), ("second", method), ("third-1", third)):
        model, adapter = adapt(model, [CASES[what].rule("mlp")], name=name, rngs=nnx.Rngs(len(adapters)))
        adapters.append(adapter)
    assert same_bits(model(inputs("mlp")), base("mlp")(inputs("mlp")))
    for adapter in adapters:
        model = perturb(model, adapter)
        constant = CASES[third if adapter.name == "third-1" else method].constant
        mine = {path for path in adapter_arrays(model) if f"/{adapter.name}/" in path}
        assert trainable_paths(model, adapter) == {p for p in mine if p.rpartition("/")[2] not in constant}
    methods = {"default": method, "second": method, "third-1": third}
    expected = expected_output("mlp", methods, model, inputs("mlp"))
    assert relative_error(run(model, inputs("mlp")), expected) <= TOLERANCES["float32"]
    if method in UPDATES:
        merged, _ = merge(model)
        assert relative_error(run(merged, inputs("mlp")), expected) <= TOLERANCES["float32"]
        # After one adapter is merged, the others still add their terms, unless these depend on the kernel.
        if not UPDATES[method].method.part.reads_kernel:
            part, _ = merge(model, ["second"])
            assert {name for _, name, *_ in iter_parts(part)} == {"default", "third-1"}
            assert relative_error(run(part, inputs("mlp")), expected) <= TOLERANCES["float32"]


# Dropout


def dropped(model, x, key):
    with adapter_dropout(key):
        return model(x)


@pytest.mark.parametrize("method", fast(ADDED, where=is_quick))
def test_dropout(method):
    model, x = trained("mlp", method)[0], inputs("mlp")
    key = jax.random.key(0)
    plain, once = run(model, x), run(model, x, key)
    assert relative_error(once, plain) > 1e-3
    assert same_bits(run(model, x, key), once)
    assert relative_error(run(model, x, jax.random.key(1)), once) > 1e-3
    assert same_bits(run(model, x), plain)
    # A model without adapters has no dropout.
    assert same_bits(run(base("mlp"), x, key), run(base("mlp"), x))


@pytest.mark.parametrize("method", fast(ADDED, where=is_quick))
def test_what_is_dropped_is_the_input_of_what_is_added_at_the_rate_of_the_method(method):
    layer, x = trained("mlp", method)[0].tail.gate, jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), "float32")
    case, key = CASES[method], jax.random.key(0)
    with adapter_dropout(key):
        kept = np.asarray(drop(jnp.ones_like(x), 0.4), np.float64)
    assert 0 < np.count_nonzero(kept) < kept.size
    found, arrays, frozen = run(layer, x, key), part_arrays(layer, "", case.slot), base("mlp").tail.gate
    x, W, b = (np.asarray(array, np.float64) for array in (x, frozen.kernel[...], frozen.bias[...]))
    if method in BRANCHES:
        y = x @ W + b
        expected = y + case.branch(arrays, y * kept)
    elif method == "dora":
        added = case.method.alpha / case.method.rank * low_rank(arrays)
        gain = arrays["magnitude"] / np.linalg.norm(W + added, axis=0)
        expected = gain * (x @ W + (x * kept) @ added) + b
    else:
        expected = x @ W + b + (x * kept) @ case.change(case.method.alpha, arrays, W)
    assert relative_error(found, expected) <= TOLERANCES["float32"]


@pytest.mark.parametrize("method", ["circulant", "lora"])
def test_the_expectation_over_dropout_is_the_output_without(method):
    layer = nnx.clone(trained("mlp", method)[0].tail.gate)
    graphdef, state = nnx.split(layer)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), jnp.float32)
    outputs = jax.jit(jax.vmap(lambda key: dropped(nnx.merge(graphdef, state), x, key)))(
        jax.random.split(jax.random.key(0), 4096)
    )
    frozen = x @ layer.kernel[...] + layer.bias[...][None]
    # The standard error is sqrt(0.4 / 0.6 / 4096), which is 1.3 %.
    assert relative_error(outputs.mean(0) - frozen, layer(x) - frozen) < 0.06
    assert relative_error(outputs[0], outputs[1]) > 0.01
