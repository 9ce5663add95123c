import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft import (
    Adapter,
    CirculantBranch,
    CirculantUpdate,
    DoRA,
    KAdaptation,
    LoRA,
    LoRAFix,
    StructuredUpdate,
    adapter_names,
    combine,
    convert,
    delete,
    load_adapter,
    save_adapter,
    set_active,
    set_scale,
)
from tests.peft.models import FAST_TO_COMPILE, by_path, parameters, part_arrays, perturb, relative_error, run, same_bits
from tests.peft.net import BODY, batch, expected, net, tuned
from tests.peft.oracles import circulant, low_rank, weight_decomposed

SHAPES = {"body/0": (6, 8), "body/1": (8, 6)}


def circulants(model, name="default", alpha=1.0):
    """Return the matrix that a circulant update adds to each kernel, by NumPy and by the path of the layer."""
    found = {path: part_arrays(model, path, "delta", name) for path in SHAPES}
    return {path: alpha * circulant(found[path]["r1"] * found[path]["r2"], *SHAPES[path]) for path in SHAPES}


def low_ranks(model, name="converted", factor=1.0):
    return {path: factor * low_rank(part_arrays(model, path, "delta", name)) for path in SHAPES}


def truncated(matrix, rank):
    """Return the nearest matrix of a given rank and its relative error.

    Both come from the SVD: the error is the norm of the dropped singular values, relative to that of all.
    """
    U, S, Vt = np.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank], float(np.linalg.norm(S[rank:]) / np.linalg.norm(S))


@functools.cache
def trained_circulant():
    return tuned(net(), CirculantUpdate(alpha=0.7))


@pytest.mark.parametrize("method", [LoRA(rank=6, alpha=5.0), LoRA(rank=2), LoRAFix(rank=2, alpha=0.2)])
def test_a_circulant_becomes_the_nearest_of_low_rank(method):
    model, adapter = trained_circulant()
    changes = circulants(model, alpha=0.7)
    converted, recipe, errors = convert(model, adapter, method)
    best = {path: truncated(change, method.rank) for path, change in changes.items()}
    assert errors.keys() == SHAPES.keys()
    for path, (nearest, error) in best.items():
        assert errors[path] == pytest.approx(error, rel=1e-4, abs=1e-6)
        assert error < 1e-12 if method.rank == 6 else error > 0.2
        factor = method.alpha / method.rank
        assert relative_error(low_ranks(converted, factor=factor)[path], nearest) < 1e-5
    wanted = expected(net(), batch(), {path: nearest for path, (nearest, _) in best.items()})
    assert relative_error(run(converted, batch()), wanted) < 1e-5
    assert adapter_names(converted) == ("converted",) and recipe.name == "converted"
    assert [rule.method for rule in recipe.rules] == [method]
    assert adapter_names(model) == ("default",)


def test_a_low_rank_one_becomes_a_smaller_one():
    model, adapter = tuned(net(), LoRA(rank=4))
    changes = low_ranks(model, "default", 1 / 4)
    converted, _, errors = convert(model, adapter, LoRA(rank=2), name="default")
    for path, change in changes.items():
        nearest, error = truncated(change, 2)
        assert errors[path] == pytest.approx(error, rel=1e-4) and error > 0.05
        assert relative_error(low_ranks(converted, "default", 1 / 2)[path], nearest) < 1e-5
        assert part_arrays(converted, path, "delta")["up"].shape == (2, SHAPES[path][1])


def test_the_scale_is_converted_too():
    model, adapter = trained_circulant()
    changes = {path: 0.3 * change for path, change in circulants(model, alpha=0.7).items()}
    converted, _, errors = convert(set_scale(model, "default", 0.3), adapter, StructuredUpdate(family="Dense"))
    assert max(errors.values()) < 1e-6
    assert relative_error(run(converted, batch()), expected(net(), batch(), changes)) < 1e-5


def test_dora_becomes_a_dense_update():
    model, adapter = tuned(net(), DoRA(rank=2, alpha=3.0), train=["head/.*"])
    weights, changes = parameters(net()), {}
    for path in SHAPES:
        kernel = weights[f"{path}/kernel"].astype(np.float64)
        changes[path] = weight_decomposed(1.5, part_arrays(model, path, "delta"), kernel)
    converted, recipe, errors = convert(model, adapter, StructuredUpdate(family="Dense", alpha=0.5))
    assert max(errors.values()) < 1e-6 and recipe.train == ("head/.*",)
    for path, change in changes.items():
        assert relative_error(0.5 * part_arrays(converted, path, "delta", "converted")["W"], change) < 1e-5
    assert relative_error(run(converted, batch()), expected(model, batch(), changes)) < 1e-5


def test_parts_of_a_fused_kernel_stay_where_they_are():
    layer = nnx.Linear(6, 15, rngs=nnx.Rngs(0))
    model, adapter = tuned(layer, CirculantUpdate(alpha=0.7), target="", parts=3, which=(0, 2))
    a = part_arrays(model, "", "delta")
    first, last = (0.7 * circulant(a[f"terms_{i}_matrix_r1"] * a[f"terms_{i}_matrix_r2"], 6, 5) for i in (0, 1))
    converted, recipe, errors = convert(model, adapter, LoRA(rank=2))
    assert (recipe.rules[0].parts, recipe.rules[0].which) == (3, (0, 2))
    wanted = np.concatenate([truncated(first, 2)[0], np.zeros((6, 5)), truncated(last, 2)[0]], axis=1)
    change = np.asarray(converted(jnp.eye(6)) - layer(jnp.eye(6)))
    assert relative_error(change, wanted) < 1e-5
    whole = np.concatenate([first, np.zeros((6, 5)), last], axis=1)
    assert errors[""] == pytest.approx(np.linalg.norm(wanted - whole) / np.linalg.norm(whole), rel=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 3.0])
def test_a_learned_alpha_starts_at_one(alpha):
    model, adapter = trained_circulant()
    converted, _, errors = convert(model, adapter, LoRA(rank=6, alpha=alpha, learn_alpha=True))
    assert max(errors.values()) < 1e-6
    changes = circulants(model, alpha=0.7)
    for path in SHAPES:
        a = part_arrays(converted, path, "delta", "converted")
        assert a["alpha"] == 1.0 and relative_error(low_rank(a) / 6, changes[path]) < 1e-5
    assert relative_error(run(converted, batch()), expected(net(), batch(), changes)) < 1e-5


@pytest.mark.exhaustive
def test_a_sum_or_product_is_searched_for():
    layer = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
    model, adapter = tuned(layer, StructuredUpdate(family="Circulant + LowRank", alpha=0.5), target="")
    a = part_arrays(model, "", "delta")
    target = 0.5 * (circulant(a["terms_0_c"], 4, 4) + a["terms_1_down"] @ a["terms_1_up"])
    # The smaller error of two approximations: by a circulant alone, which has the mean of every (cyclic) diagonal of
    # the target, and by a matrix of rank 1 alone.
    means = [np.mean([target[i, (i + k) % 4] for i in range(4)]) for k in range(4)]
    apart = min(relative_error(circulant(np.array(means), 4, 4), target), truncated(target, 1)[1])
    lowest = {}
    for family in ("Circulant + LowRank", "Toeplitz @ Circulant"):
        converted, _, errors = convert(model, adapter, StructuredUpdate(family=family))
        change = np.asarray(converted(jnp.eye(4)) - layer(jnp.eye(4)))
        lowest[family] = relative_error(change, target)
        assert lowest[family] == pytest.approx(errors[""], abs=1e-5)
    assert lowest["Circulant + LowRank"] < 1e-3 < 0.1 < apart and lowest["Toeplitz @ Circulant"] < apart


def test_a_converted_adapter_is_saved_loaded_and_trained(tmp_path):
    model, adapter = tuned(net(), CirculantUpdate(), train=["head/.*"])
    converted, recipe, _ = convert(model, adapter, LoRA(rank=2))
    save_adapter(tmp_path / "a", converted, recipe)
    loaded, again = load_adapter(tmp_path / "a", net(), name="converted")
    assert again == recipe and nnx.graphdef(loaded) == nnx.graphdef(converted)
    assert same_bits(run(loaded, batch()), run(converted, batch()))
    graphdef, trainable, frozen = nnx.split(converted, recipe.trainable, ...)

    @functools.partial(jax.jit, compiler_options=FAST_TO_COMPILE)
    def gradient(trainable):
        return jax.value_and_grad(lambda t: jnp.mean(nnx.merge(graphdef, t, frozen)(batch()) ** 2))(trainable)

    before, grads = gradient(trainable)
    flat = by_path(grads)
    assert flat.keys() == {
        "head/kernel",
        "head/bias",
        *(f"{path}/delta/converted/{factor}" for path in SHAPES for factor in ("down", "up")),
    }
    assert all(float(jnp.abs(v[...]).max()) > 0 for v in flat.values())
    after, _ = gradient(jax.tree.map(lambda p, g: p - 0.01 * g, trainable, grads))
    assert float(after) < float(before)


def test_an_update_of_zero_has_no_error_and_can_learn():
    model, adapter = tuned(net(), CirculantUpdate())
    converted, _, errors = convert(set_active(model, []), adapter, LoRA(rank=2))
    assert set(errors.values()) == {0.0}
    assert same_bits(run(set_active(converted, []), batch()), run(net(), batch()))
    assert all(np.abs(part_arrays(converted, path, "delta", "converted")["down"]).max() > 0 for path in SHAPES)


def test_what_cannot_be_converted_is_refused():
    model, adapter = trained_circulant()
    refused = {
        LoRA(rank=7): r"^body/0 cannot become lora: .*rank from 1 to 6, but 7",
        KAdaptation(terms=4): r"^body/0 cannot become kadaptation: terms=4 must divide",
        DoRA(): r"^body/0 cannot become dora: it normalises",
        CirculantBranch(): r"converted to an update such as LoRA\(rank=4\), not to CirculantBranch",
        "lora": r"converted to an update such as LoRA\(rank=4\), not to 'lora'",
    }
    for method, message in refused.items():
        with pytest.raises(UserError, match=message):
            convert(model, adapter, method)
    with pytest.raises(UserError, match=r"^the model has no adapter 'default'"):
        convert(net(), adapter, LoRA())
    with pytest.raises(UserError, match=r"^the adapter 'probe' has no update"):
        convert(model, Adapter((), ("head/.*",), "probe"), LoRA())
    branched, branch = tuned(model, CirculantBranch(), target="body/1", name="side")
    with pytest.raises(UserError, match=r"^body/1 has a part of the adapter 'side' that .* no kernel can hold"):
        convert(branched, branch, LoRA())
    with pytest.raises(UserError, match=r"has an adapter called 'side' already"):
        convert(branched, adapter, LoRA(), name="side")
    broken = nnx.clone(model)
    broken.body[1].delta["default"].r1[...] = jnp.full(8, jnp.nan)
    with pytest.raises(UserError, match=r"^body/1 cannot be converted: .*not finite"):
        convert(broken, adapter, LoRA())


def test_other_adapters_and_what_else_was_trained_stay():
    model, adapter = tuned(net(), CirculantUpdate(), train=["head/.*"])
    model, _ = tuned(model, LoRA(rank=2), target="body/1", name="other", seed=2)
    converted, _, _ = convert(model, adapter, LoRA(rank=6))
    assert adapter_names(converted) == ("converted", "other")
    assert same_bits(converted.head.kernel[...], model.head.kernel[...])
    assert relative_error(run(converted, batch()), run(model, batch())) < 1e-5
    bare = delete(delete(converted, "other"), "converted")
    assert nnx.graphdef(bare) == nnx.graphdef(net()) and same_bits(bare.body[0].kernel[...], net().body[0].kernel[...])


@functools.cache
def pair(method):
    """Return a model with two adapters that have the same rules, and the two adapters."""
    model, one = tuned(net(), method, name="one", seed=1)
    model, two = tuned(model, method, name="two", seed=2)
    return model, one, two


def test_circulants_are_combined_exactly():
    model, one, two = pair(CirculantUpdate(alpha=0.7))
    first, second = circulants(model, "one", 0.7), circulants(model, "two", 0.7)
    combined, recipe, errors = combine(model, {one: 0.25, two: -1.5})
    assert max(errors.values()) < 1e-6 and recipe.rules == one.rules
    assert adapter_names(combined) == ("combined", "one", "two") and adapter_names(model) == ("one", "two")
    changes = {path: 0.25 * first[path] - 1.5 * second[path] for path in SHAPES}
    alone = set_active(combined, ["combined"])
    assert relative_error(run(alone, batch()), expected(model, batch(), changes)) < 1e-5
    for path in SHAPES:
        c = part_arrays(combined, path, "delta", "combined")["c"]
        assert relative_error(0.7 * circulant(c, *SHAPES[path]), changes[path]) < 1e-5
    # Halving the scale of the first adapter and doubling its weight gives the same result.
    halved, _, _ = combine(set_scale(model, "one", 0.5), {one: 0.5, two: -1.5}, name="halved")
    assert relative_error(run(set_active(halved, ["halved"]), batch()), run(alone, batch())) < 1e-5


def test_of_low_rank_the_nearest_combination_is_found():
    model, one, two = pair(LoRA(rank=2))
    combined, _, errors = combine(model, {one: 0.5, two: 0.5})
    for path in SHAPES:
        total = (low_ranks(model, "one", 0.5)[path] + low_ranks(model, "two", 0.5)[path]) / 2
        nearest, error = truncated(total, 2)
        assert errors[path] == pytest.approx(error, rel=1e-4) and error > 0.05
        assert relative_error(low_ranks(combined, "combined", 0.5)[path], nearest) < 1e-5


def test_a_combined_adapter_is_saved_and_loaded(tmp_path):
    model, one, two = pair(CirculantUpdate(alpha=0.7))
    combined, recipe, _ = combine(model, {one: 0.5, two: 0.5})
    save_adapter(tmp_path / "a", combined, recipe)
    loaded, _ = load_adapter(tmp_path / "a", net())
    assert same_bits(run(loaded, batch()), run(delete(delete(combined, "one"), "two"), batch()))


def test_what_cannot_be_combined_is_refused():
    model, one, two = pair(CirculantUpdate(alpha=0.7))
    model, low = tuned(model, LoRA(rank=2), target=BODY, name="low", seed=3)
    with pytest.raises(
        UserError, match=r"^the adapters 'one' and 'low' have different rules: convert one of them first"
    ):
        combine(model, {one: 0.5, low: 0.5})
    alike, recipe, _ = convert(model, low, CirculantUpdate(alpha=0.7))
    assert "combined" in adapter_names(combine(alike, {one: 0.5, recipe: 0.5})[0])
    for weights in ({}, [one, two]):
        with pytest.raises(UserError, match=r"^combine needs a weight for every adapter, \{adapter: 0.5, ...\}, got"):
            combine(model, weights)
    with pytest.raises(UserError, match=r"has an adapter called 'two' already"):
        combine(model, {one: 0.5, two: 0.5}, name="two")
    with pytest.raises(UserError, match=r"^body/0 cannot be converted: .*not finite"):
        combine(model, {one: float("nan"), two: 0.5})
    with pytest.raises(UserError, match=r"^the model has no adapter 'two'"):
        combine(delete(model, "two"), {one: 0.5, two: 0.5})
    decomposed, first, second = pair(DoRA())
    with pytest.raises(UserError, match=r"^body/0 cannot become dora"):
        combine(decomposed, {first: 0.5, second: 0.5})
    branched, side = tuned(net(), CirculantBranch(), target="body/1", name="side")
    with pytest.raises(UserError, match=r"^body/1 has a part of the adapter 'side' that .* no kernel can hold"):
        combine(branched, {side: 1.0})


def test_it_works_in_tree_mode():
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        model, adapter = tuned(net(), CirculantUpdate(alpha=0.7))
        converted, _, _ = convert(perturb(model, adapter, 4), adapter, LoRA(rank=6))
        assert relative_error(converted(batch()), perturb(model, adapter, 4)(batch())) < 1e-5
