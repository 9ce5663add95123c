import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.models import TARGETS
from surm_jax.peft import (
    CirculantBranch,
    CirculantUpdate,
    DoRA,
    KroneckerUpdate,
    LoRA,
    adapter_names,
    combine,
    convert,
    delete,
    describe,
    iter_parts,
    load_adapter,
    merge,
    save_adapter,
    save_peft,
    set_active,
    set_scale,
)
from tests.peft import models
from tests.peft.models import (
    FAST_TO_COMPILE,
    parameters,
    part_arrays,
    perturb,
    relative_error,
    run,
    same_bits,
    trainable_paths,
)
from tests.peft.net import BODY, batch, expected, net, tuned
from tests.peft.oracles import circulant, kronecker, low_rank


@functools.cache
def three():
    """Return a model with two update adapters, "one" and "two", and a branch adapter "side", and what they add.

    Returns:
        The model, the adapters by name, the changes of kernels by adapter and layer path, and a function of a layer's
        output that returns what the branch adds. NumPy computes the last two.
    """
    model, one = tuned(net(), CirculantUpdate(alpha=0.7), name="one", seed=1)
    model, two = tuned(model, LoRA(rank=2, alpha=3.0), name="two", target="body/0|head", seed=2)
    model, branch = tuned(model, CirculantBranch(alpha=0.8), name="side", target="body/1", seed=3)
    changes = {"one": {}, "two": {}}
    for path, shape in (("body/0", (6, 8)), ("body/1", (8, 6))):
        a = part_arrays(model, path, "delta", "one")
        changes["one"][path] = 0.7 * circulant(a["r1"] * a["r2"], *shape)
    for path in ("body/0", "head"):
        changes["two"][path] = 1.5 * low_rank(part_arrays(model, path, "delta", "two"))
    a = part_arrays(model, "body/1", "branch", "side")
    matrix, bias = circulant(a["down/r1"] * a["down/r2"], 6, 6), a["bias"]

    def moved(y):
        z = y @ matrix
        return 0.8 * (z * (1 + scipy.special.erf(z / np.sqrt(2))) / 2 + bias)

    return model, {"one": one, "two": two, "side": branch}, changes, moved


def oracle(x, scales):
    """Compute the output that the model of `three` must have, by NumPy.

    `scales` maps names of adapters to scales. All other adapters have the scale 0.
    """
    model, _, changes, moved = three()
    total = dict.fromkeys(("body/0", "body/1", "head"), 0)
    for name in scales.keys() & changes.keys():
        for path, change in changes[name].items():
            total[path] = total[path] + scales[name] * change
    return expected(model, x, total, {"body/1": lambda y: scales.get("side", 0) * moved(y)})


SCALES = [
    {"one": 1.0, "two": 1.0, "side": 1.0},
    {"one": 1.0},
    {"two": 1.0, "side": 1.0},
    {"one": 0.3, "two": -2.0, "side": 0.5},
]


@pytest.mark.parametrize("scales", SCALES)
def test_adapters_sum_on_the_same_input_at_their_scales(scales):
    model = three()[0]
    for name in ("one", "two", "side"):
        model = set_scale(model, name, scales.get(name, 0.0))
    assert relative_error(run(model, batch()), oracle(batch(), scales)) < 1e-5
    # Every adapter changes the output by far more than the tolerance.
    for name in scales:
        rest = {other: scale for other, scale in scales.items() if other != name}
        assert relative_error(oracle(batch(), rest), oracle(batch(), scales)) > 0.05


def test_the_active_ones_are_as_they_were_trained_and_the_others_off():
    model = set_scale(three()[0], "one", 0.3)
    active = set_active(model, ["one", "side"])
    assert relative_error(run(active, batch()), oracle(batch(), {"one": 1.0, "side": 1.0})) < 1e-5
    once_only = set_active(model, (name for name in ["two"]))
    assert relative_error(run(once_only, batch()), oracle(batch(), {"two": 1.0})) < 1e-5
    assert relative_error(run(model, batch()), oracle(batch(), {"one": 0.3, "two": 1.0, "side": 1.0})) < 1e-5


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_with_all_switched_off_it_computes_the_bits_of_the_base(precision):
    base, x = net(precision), batch(dtype=precision)
    model, _ = tuned(base, KroneckerUpdate(dropout=0.5), name="kronecker")
    model, _ = tuned(model, LoRA(rank=2, learn_alpha=True), target="body/0|head", name="lora", seed=2)
    model, _ = tuned(model, DoRA(rank=2), target="body/1", name="dora", seed=3)
    model, _ = tuned(model, CirculantBranch(), target="body/0", name="side", seed=4)
    off = set_active(model, [])
    for name in adapter_names(model):
        model = set_scale(model, name, 0.0)
    assert same_bits(run(off, x), run(base, x)) and same_bits(run(model, x), run(base, x))
    if precision == "float32":
        assert same_bits(run(off, x, jax.random.key(0)), run(base, x))
    assert all(relative_error(run(set_active(model, [name]), x), run(base, x)) > 0.03 for name in adapter_names(model))


def test_a_vision_transformer_with_all_switched_off_computes_the_bits_of_the_base():
    base, x = models.base("deep"), models.inputs("deep")
    model, _ = tuned(base, CirculantUpdate(), target=TARGETS["qv"], name="one")
    model, _ = tuned(model, LoRA(rank=2), target=TARGETS["attention"], name="two", seed=2)
    assert same_bits(run(set_active(model, []), x), run(base, x))
    assert relative_error(run(model, x), run(base, x)) > 0.03


def test_nothing_is_compiled_again_for_switching_scaling_and_exchanging(tmp_path):
    traces = []

    @functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_TO_COMPILE)
    def forward(graphdef, state, x):
        traces.append(None)
        return nnx.merge(graphdef, state)(x)

    def output(model):
        return forward(*nnx.split(model), x)

    x, model = batch(), net()
    for name, seed in (("one", 1), ("two", 2)):
        for kind, other in (("", seed), ("_other", seed + 10)):
            trained, adapter = tuned(net(), CirculantUpdate(), name=name, seed=other)
            save_adapter(tmp_path / f"{name}{kind}", trained, adapter)
        model, _ = load_adapter(tmp_path / name, model, name=name)
    outputs = [output(model), output(set_scale(model, "one", 0.3)), output(set_active(model, ["two"]))]
    outputs += [output(set_active(model, [])), output(delete(delete(model, "one"), "two"))]
    assert len(traces) == 2, "the model with adapters, and the base"
    assert same_bits(outputs[-2], outputs[-1])
    # The order in which adapters are added makes no difference.
    for name in ("one", "two", "one"):
        model, _ = load_adapter(tmp_path / f"{name}_other", delete(model, name), name=name)
        outputs.append(output(model))
    assert len(traces) == 2
    fresh, _ = load_adapter(tmp_path / "two_other", net(), name="two")
    fresh, _ = load_adapter(tmp_path / "one_other", fresh, name="one")
    assert same_bits(output(fresh), outputs[-1]) and len(traces) == 2
    different = [outputs[i] for i in (0, 1, 2, 3, 5, 6)]
    assert all(relative_error(a, b) > 0.01 for i, a in enumerate(different) for b in different[:i])


def test_scales_may_be_traced():
    graphdef, state = nnx.split(three()[0])

    @functools.partial(jax.jit, compiler_options=FAST_TO_COMPILE)
    def swept(scale):
        return set_scale(set_active(nnx.merge(graphdef, state), []), "two", scale)(batch())

    assert relative_error(swept(jnp.float32(-2.0)), oracle(batch(), {"two": -2.0})) < 1e-5


def test_merging_some_of_them_leaves_the_others_and_the_model():
    x, (model, _, changes, _) = batch(), three()
    model = set_scale(set_scale(model, "one", 0.3), "side", 0.5)
    before = run(model, x)
    merged, deviation = merge(model, ["one"])
    assert adapter_names(merged) == ("side", "two") and deviation < 1e-6
    for path in ("body/0", "body/1"):
        kernel = parameters(net())[f"{path}/kernel"].astype(np.float64)
        assert relative_error(parameters(merged)[f"{path}/kernel"], kernel + 0.3 * changes["one"][path]) < 1e-6
    assert same_bits(parameters(merged)["head/kernel"], net().head.kernel[...])
    assert relative_error(run(merged, x), oracle(x, {"one": 0.3, "two": 1.0, "side": 0.5})) < 1e-5
    # The merge did not change the model, so that using it again undoes the merge.
    assert same_bits(run(model, x), before)
    bare = functools.reduce(delete, ("one", "two", "side"), model)
    assert same_bits(run(bare, x), run(net(), x)) and nnx.graphdef(bare) == nnx.graphdef(net())


def test_deleting_gives_the_plain_classes_back():
    model, _, _, _ = three()
    assert adapter_names(model) == ("one", "side", "two") and adapter_names(net()) == ()
    left = delete(model, "one")
    assert [(path, name) for path, name, *_ in iter_parts(left)] == [
        ("body/0", "two"),
        ("body/1", "side"),
        ("head", "two"),
    ]
    assert isinstance(left.body[1], nnx.Linear) and not hasattr(left.body[1], "delta")
    assert relative_error(run(left, batch()), oracle(batch(), {"two": 1.0, "side": 1.0})) < 1e-5
    left = delete(left, "side")
    assert type(left.body[1]) is nnx.Linear and type(left.body[0]) is not nnx.Linear
    left = delete(left, "two")
    assert all(type(layer) is nnx.Linear for layer in (*left.body, left.head))
    assert nnx.graphdef(left) == nnx.graphdef(net())
    assert adapter_names(model) == ("one", "side", "two")


def test_what_else_was_trained_stays():
    model, _ = tuned(net(), LoRA(), name="one", train=["head/.*"])
    changed = delete(model, "one")
    assert same_bits(changed.head.kernel[...], model.head.kernel[...])
    assert relative_error(run(changed, batch()), expected(model, batch())) < 1e-5
    assert relative_error(model.head.kernel[...], net().head.kernel[...]) > 0.1


def renamed(name):
    return dataclasses.replace(three()[1]["one"], name=name)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, name: set_scale(model, name, 0.5),
        lambda model, name: set_active(model, ["one", name]),
        lambda model, name: merge(model, [name]),
        delete,
        lambda model, name: describe(model, renamed(name)),
        lambda model, name: save_adapter("nowhere", model, renamed(name)),
        lambda model, name: save_peft("nowhere", model, renamed(name), None),
        lambda model, name: convert(model, renamed(name), LoRA()),
        lambda model, name: combine(model, {renamed(name): 1.0}),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = three()[0]
    with pytest.raises(UserError, match=r"^the model has no adapter 'oen'; did you mean 'one'\? \(known: one, side,"):
        call(model, "oen")
    with pytest.raises(UserError, match=r"^the model has no adapter '(one|default)' \(known: none\)"):
        call(net(), "default")
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_given_by_itself_or_by_its_name_unless_the_recipe_is_needed():
    model, adapters, _, _ = three()
    for call in (set_active, merge):
        for one in ("one", adapters["one"]):
            with pytest.raises(
                UserError, match=r"^adapters must be a list, got one adapter: write \[('one'|adapter)\]$"
            ):
                call(model, one)
        with pytest.raises(UserError, match=r"^adapters must be a list, such as \['default'\], got 5$"):
            call(model, 5)
    for call in (delete, lambda model, name: set_active(model, [name]), lambda model, name: merge(model, [name])):
        by_name, by_adapter = call(model, "one"), call(model, adapters["one"])
        same = jax.tree.map(same_bits, *(nnx.state(x[0] if isinstance(x, tuple) else x) for x in (by_name, by_adapter)))
        assert all(jax.tree.leaves(same))
        with pytest.raises(UserError, match=r"^an adapter is given as an Adapter or by its name, .*, got 5$"):
            call(model, 5)
    for call in (describe, lambda *args: save_adapter("nowhere", *args), lambda *args: convert(*args, LoRA())):
        with pytest.raises(
            UserError, match=r"^adapter must be the Adapter that `adapt` or `load_adapter` returned .* got 'one'$"
        ):
            call(model, "one")
    with pytest.raises(UserError, match=r"^adapter must be the Adapter .* got 'two'$"):
        combine(model, {adapters["one"]: 0.5, "two": 0.5})


@pytest.mark.parametrize("name", ["delta", "branch"])
def test_a_name_that_would_hide_what_is_trained_is_refused(name):
    with pytest.raises(UserError, match=f"^an adapter cannot be called {name!r}"):
        tuned(net(), LoRA(), name=name)


def test_each_adapter_is_saved_and_loaded_alone(tmp_path):
    model, adapters, _, _ = three()
    for name, adapter in adapters.items():
        save_adapter(tmp_path / name, model, adapter)
        alone, loaded = load_adapter(tmp_path / name, net(), name="other")
        assert adapter_names(alone) == ("other",) and loaded.rules == adapter.rules
        assert relative_error(run(alone, batch()), oracle(batch(), {name: 1.0})) < 1e-5
        only = functools.reduce(delete, adapters.keys() - {name}, model)
        assert same_bits(run(alone, batch()), run(only, batch()))


def test_two_adapters_are_trained_by_two_optimisers():
    model, adapters, _, _ = three()
    model, adapters["head"] = tuned(model, CirculantUpdate(), target="body/1", name="head", train=["head/.*"])
    owned = {name: trainable_paths(model, adapter) for name, adapter in adapters.items()}
    assert owned == {
        "one": {f"body/{i}/delta/one/{r}" for i in (0, 1) for r in ("r1", "r2")},
        "two": {f"{path}/delta/two/{factor}" for path in ("body/0", "head") for factor in ("down", "up")},
        "side": {f"body/1/branch/side/{rest}" for rest in ("bias", "down/r1", "down/r2")},
        "head": {"body/1/delta/head/r1", "body/1/delta/head/r2", "head/kernel", "head/bias"},
    }
    optimizers = {"one": optax.adam(1e-2), "head": optax.sgd(1e-1, momentum=0.9)}
    x, labels = batch(), jnp.arange(8).reshape(4, 2) % 3

    @functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_TO_COMPILE)
    def step(name, trainable, frozen, opt_state):
        split = nnx.split(model, adapters[name].trainable, ...)[0]

        def loss(trainable):
            logits = nnx.merge(split, trainable, frozen)(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(trainable)
        with jax.numpy_dtype_promotion("standard"):  # Adam counts its steps as an integer.
            updates, opt_state = optimizers[name].update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    opt_states, losses = {}, []
    for name in ["one", "head"] * 4:
        split, trainable, frozen = nnx.split(model, adapters[name].trainable, ...)
        before = models.adapter_arrays(model) | parameters(model)
        opt_state = opt_states.get(name) or optimizers[name].init(trainable)
        trainable, opt_states[name], value = step(name, trainable, frozen, opt_state)
        losses.append(float(value))
        model = nnx.merge(split, trainable, frozen)
        after = models.adapter_arrays(model) | parameters(model)
        assert {path for path in after if not same_bits(before[path], after[path])} == owned[name]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]


def test_it_works_in_tree_mode():
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        model, adapter = tuned(net(), LoRA(rank=2), name="one")
        model, _ = tuned(model, CirculantBranch(), target=BODY, name="two", seed=2)
        model = delete(set_scale(set_active(perturb(model, adapter, 3), ["one"]), "one", 0.5), "two")
        changes = {path: 0.25 * low_rank(part_arrays(model, path, "delta", "one")) for path in ("body/0", "body/1")}
        assert relative_error(model(batch()), expected(model, batch(), changes)) < 1e-5


def test_a_kronecker_update_beside_another_of_the_same_family():
    model, _ = tuned(net(), KroneckerUpdate(), name="one")
    model, _ = tuned(model, KroneckerUpdate(alpha=2.0), name="two", seed=2)
    changes = {
        path: sum(
            alpha * kronecker(part_arrays(model, path, "delta", name)) for name, alpha in (("one", 1), ("two", 2))
        )
        for path in ("body/0", "body/1")
    }
    assert relative_error(run(model, batch()), expected(model, batch(), changes)) < 1e-5
