from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.models import TARGETS
from surm_jax.peft import (
    Adapter,
    AdapterDrop,
    BottleneckBranch,
    CirculantBranch,
    CirculantUpdate,
    LoRA,
    Rule,
    adapt,
    iter_parts,
)
from surm_jax.peft.kernels import AdaptedLayer
from surm_jax.peft.owners import owners, release
from tests.peft.cases import CASES, EVERY, fresh, trained
from tests.peft.kernels.test_base import ReadsKernel, stacked
from tests.peft.models import MLP, MODELS, base, materialize, parameters, same_bits
from tests.speeds import fast


def adapt_mlp(*rules, train=()):
    return adapt(base("mlp"), [Rule(target, LoRA()) for target in rules], train=train, rngs=nnx.Rngs(1))


def kinds(model):
    """Return the matrix family of each adapted layer's update, by the path of the layer."""
    return {path: type(delta.stored()).__name__ for path, _, delta, _ in iter_parts(model)}


class Mixed(nnx.Module):
    """A model with some layers that can be adapted, and others that cannot."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.stem = nnx.Conv(4, 4, kernel_size=(3,), rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.up = nnx.Linear(4, 4, rngs=rngs)
        self.sum = nnx.Einsum("ab,ab->a", (4, 4), rngs=rngs)
        self.sum.einsum_str = None
        self.reader = ReadsKernel(4, 4, rngs=rngs)


@pytest.mark.parametrize(
    ("name", "method"),
    [(n, m) for n, m in EVERY if m in ("circulant", "circulant_adapter") or (n, m) == ("mlp", "dora")],
)
def test_the_original_stays_as_it_was(name, method):
    original = materialize(MODELS[name].make)
    structure, before = nnx.graphdef(original), parameters(original)
    model, adapter = adapt(original, [CASES[method].rule(name)], train=MODELS[name].train, rngs=nnx.Rngs(1))
    _, trainable, _ = nnx.split(model, adapter.trainable, ...)
    for _, variable in nnx.to_flat_state(trainable):
        variable[...] = variable[...] + 1
    nnx.update(model, trainable)
    assert nnx.graphdef(original) == structure
    after = parameters(original)
    assert after.keys() == before.keys()
    assert all(same_bits(before[path], after[path]) for path in before)


@pytest.mark.parametrize(
    ("name", "method"),
    fast(EVERY, where=lambda case: case[1] in ("circulant", "circulant_adapter", "dora"), unpack=True),
)
def test_both_models_hold_the_same_arrays(name, method):
    model, _ = fresh(name, method)
    arrays = {path: v[...] for path, v in nnx.to_flat_state(nnx.state(model))}
    for path, variable in nnx.to_flat_state(nnx.state(base(name))):
        assert arrays[path] is variable[...], path


def test_the_first_rule_that_matches_counts():
    rules = [Rule("blocks/0", LoRA(rank=1)), Rule(r"blocks/\d+", CirculantUpdate()), Rule(".*", LoRA(rank=2))]
    model, _ = adapt(base("mlp"), rules, rngs=nnx.Rngs(1))
    assert kinds(model) == {
        "blocks/0": "LowRank", "blocks/1": "CirculantPair", "head": "LowRank", "tail/gate": "LowRank"
    }  # fmt: skip
    assert (model.blocks[0].delta["default"].stored().rank, model.head.delta["default"].stored().rank) == (1, 2)


def test_a_pattern_may_match_other_modules_too():
    model, _ = adapt(
        materialize(lambda: Mixed(rngs=nnx.Rngs(0))), [Rule("embed|stem|norm|up", LoRA())], rngs=nnx.Rngs(1)
    )
    assert kinds(model) == {"embed": "LowRank", "stem": "LowRank", "up": "LowRank"}
    assert type(model.norm) is nnx.LayerNorm


def test_the_random_numbers_come_from_the_stream_params():
    def draw(seed):
        rules = [Rule("blocks/0", CirculantUpdate())]
        return np.asarray(adapt(base("mlp"), rules, rngs=nnx.Rngs(params=seed))[0].blocks[0].delta["default"].r2[...])

    assert same_bits(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))


def test_an_abstract_model_is_adapted_without_arrays():
    model = nnx.eval_shape(lambda: adapt(MLP(rngs=nnx.Rngs(0)), [Rule(".*", LoRA())], rngs=nnx.Rngs(1))[0])
    assert [path for path, *_ in iter_parts(model)] == ["blocks/0", "blocks/1", "head", "tail/gate"]
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model)))


def test_no_rules_is_a_selection_alone():
    model, adapter = adapt(base("mlp"), [], train=["head/.*"], rngs=nnx.Rngs(1))
    assert owners(model) == {"head/bias": "default", "head/kernel": "default"}
    release(model, ["default"])
    assert nnx.graphdef(model) == nnx.graphdef(base("mlp"))
    assert adapter.train == ("head/.*",)


@pytest.mark.parametrize(
    ("rules", "train", "message"),
    [
        (["blocks/0/kernl"], (), r"'blocks/0/kernl' matches no layer with a kernel .*nearest of 4: blocks/0"),
        (["tail/gaet"], (), r"'tail/gaet' matches no layer with a kernel .*nearest of 4: tail/gate"),
        ([r"blocks/\d+", "hed"], (), r"'hed' matches no layer with a kernel .*nearest of 4: head"),
        (["tail/norm"], (), r"'tail/norm' matches no layer with a kernel, only tail/norm \(LayerNorm\); .*head"),
        (["blocks"], (), r"'blocks' matches no layer with a kernel, only blocks \(List\)"),
        ([r"blocks/\d+", "blocks/1"], (), r"the rule 'blocks/1' has no effect"),
        ([".*", "head"], (), r"the rule 'head' has no effect"),
        (["head"], ["hed/.*"], r"'hed/\.\*' matches no parameter .*nearest of 9: head/"),
        (["head"], ["head/.*", "head"], r"'head' matches no parameter"),
        (["head"], [r"head/delta/.*"], r"'head/delta/\.\*' matches no parameter"),
        (["head"], ["head/("], r"'head/\(' is not a regular expression"),
    ],
)  # fmt: skip
def test_rules_and_patterns_without_effect_are_refused(rules, train, message):
    with pytest.raises(UserError, match=message):
        adapt_mlp(*rules, train=train)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("norm", r"only norm \(LayerNorm\); there are, for example, embed, reader, stem, sum, up"),
        ("sum", r"^sum cannot be adapted: it is called with another equation each time"),
        ("reader", r"^reader cannot be adapted: ReadsKernel\.__call__ does not call super"),
        ("up|sum", r"^sum cannot be adapted"),
    ],
)
def test_layers_that_cannot_be_adapted_are_named(target, message):
    with pytest.raises(UserError, match=message):
        adapt(materialize(lambda: Mixed(rngs=nnx.Rngs(0))), [Rule(target, LoRA())], rngs=nnx.Rngs(1))


def test_an_abstract_stack_of_layers_is_adapted():
    model = nnx.Dict(blocks=nnx.eval_shape(lambda: stacked(lambda rngs: nnx.Dict(up=nnx.Linear(4, 5, rngs=rngs)))))
    model, _ = adapt(model, [Rule("blocks/up", LoRA())], rngs=nnx.Rngs(1))
    assert model.blocks["up"].delta["default"].up.shape == (3, 1, 5)


@pytest.mark.parametrize("rank", [5, 40])
def test_an_impossible_rank_is_named_with_the_layer(rank):
    with pytest.raises(UserError, match=rf"^blocks/1 cannot be adapted: .*10 x 4 .*from 1 to 4, but {rank} "):
        adapt(base("mlp"), [Rule("blocks/1", LoRA(rank=rank))], rngs=nnx.Rngs(1))


@pytest.mark.parametrize("target", [r"blocks/\d+", "head"])
@pytest.mark.parametrize("method", ["lora", "circulant_adapter"])
def test_a_name_is_given_once(target, method):
    model, _ = trained("mlp", method)
    for new in (LoRA(), CirculantBranch()):
        with pytest.raises(UserError, match=r"^the model has an adapter called 'default' already: merge or delete it"):
            adapt(model, [Rule(target, new)], rngs=nnx.Rngs(1))
        adapt(model, [Rule(target, new)], name="other", rngs=nnx.Rngs(1))


def test_presets_of_the_vit_adapt_what_they_say():
    model, _ = adapt(base("deep"), [Rule(TARGETS["all-linear"], LoRA())], rngs=nnx.Rngs(1))
    assert len(kinds(model)) == 2 * 6
    assert not isinstance(model.head, AdaptedLayer)


class Named(MLP):
    """A model whose class defines presets, which are names for sets of its modules."""

    adapter_targets: ClassVar = {"blocks": r"blocks/\d+", "all-linear": r"blocks/\d+|tail/gate|head"}


class TestNamedTargets:
    def test_they_stand_for_their_patterns(self):
        model, adapter = adapt(Named(rngs=nnx.Rngs(0)), [Rule("blocks", LoRA(rank=2))], rngs=nnx.Rngs(1))
        assert kinds(model) == {"blocks/0": "LowRank", "blocks/1": "LowRank"}
        # The adapter stores the regular expression of the preset, since another model may define other presets.
        assert adapter.rules == (Rule(r"blocks/\d+", LoRA(rank=2)),)
        rules = [Rule("tail/gate", None), Rule("all-linear", CirculantBranch())]
        model, _ = adapt(model, rules, name="second", rngs=nnx.Rngs(1))
        assert [path for path, name, *_ in iter_parts(model) if name == "second"] == [
            "blocks/0", "blocks/1", "head"
        ]  # fmt: skip

    def test_a_mistyped_one_is_answered_with_the_nearest(self):
        for target, near in (("blcoks", "'blocks'"), ("all_linaer", "'all-linear'")):
            with pytest.raises(
                UserError, match=rf"{target!r} matches no layer with a kernel .*; did you mean {near}\?$"
            ):
                adapt(Named(rngs=nnx.Rngs(0)), [Rule("head", None), Rule(target, LoRA())], rngs=nnx.Rngs(1))


def test_what_is_no_rule_is_refused():
    with pytest.raises(UserError, match=r"^rules must be a list of rules, .* got LoRA\(.*\) in it$"):
        adapt(base("mlp"), [Rule("head", LoRA()), LoRA()], rngs=nnx.Rngs(1))
    with pytest.raises(UserError, match=r"^rules must be a list of rules, got one"):
        adapt(base("mlp"), Rule("head", LoRA()), rngs=nnx.Rngs(1))


def test_one_string_is_no_list_of_patterns():
    with pytest.raises(UserError, match=r"got one string: write \['head/\.\*'\]"):
        adapt_mlp("head", train="head/.*")


@pytest.mark.parametrize("skip", [2, 12])
def test_a_method_that_leaves_no_block_names_its_limit(skip):
    message = (
        rf"^the rule '.*' adapts nothing: adapter_drop\.skip={skip} .* the last block is 1, so skip must be at most 1$"
    )
    with pytest.raises(UserError, match=message):
        adapt(base("deep"), [Rule(TARGETS["houlsby"], AdapterDrop(skip=skip))], rngs=nnx.Rngs(1))
    for skip, blocks in ((1, {"1"}), (0, {"0", "1"})):
        model, _ = adapt(base("deep"), [Rule(TARGETS["houlsby"], AdapterDrop(skip=skip))], rngs=nnx.Rngs(1))
        assert {path.split("/")[1] for path, *_ in iter_parts(model)} == blocks


class TestExclusions:
    def test_later_rules_do_not_get_what_a_rule_without_method_keeps(self):
        rules = [Rule("blocks/0|head", None), Rule(".*", LoRA())]
        model, adapter = adapt(base("mlp"), rules, rngs=nnx.Rngs(1))
        assert kinds(model) == {"blocks/1": "LowRank", "tail/gate": "LowRank"}
        assert Adapter.from_json(adapter.to_json()) == adapter

    def test_earlier_rules_keep_theirs(self):
        model, _ = adapt(base("mlp"), [Rule("blocks/0", LoRA()), Rule(r"blocks/\d+", None)], rngs=nnx.Rngs(1))
        assert kinds(model) == {"blocks/0": "LowRank"}

    def test_of_branches(self):
        rules = [Rule("blocks/0/mlp", None), Rule(TARGETS["houlsby"], BottleneckBranch())]
        model, _ = adapt(base("deep"), rules, rngs=nnx.Rngs(1))
        assert [path for path, *_ in iter_parts(model)] == [
            "blocks/0/attention", "blocks/1/attention", "blocks/1/mlp"
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("rules", "message"),
        [
            ([Rule("hed", None), Rule(".*", LoRA())], r"'hed' matches no module .*nearest of \d+: .*head"),
            ([Rule(".*", LoRA()), Rule("head", None)], r"the rule 'head' has no effect"),
            ([Rule("head", None), Rule("head", LoRA())], r"the rule 'head' has no effect"),
        ],
    )
    def test_without_effect_are_refused(self, rules, message):
        with pytest.raises(UserError, match=message):
            adapt(base("mlp"), rules, rngs=nnx.Rngs(1))


def test_one_dead_rule_among_many_is_named_with_its_near_misses():
    rules = [Rule(rf"blocks/{i}", LoRA()) for i in range(2)] + [Rule("tail/gat", LoRA()), Rule("head", LoRA())]
    with pytest.raises(UserError, match=r"'tail/gat' matches no layer with a kernel .*nearest of 4: tail/gate"):
        adapt(base("mlp"), rules, rngs=nnx.Rngs(1))
    rules = [Rule("head", LoRA()), Rule("tail/nrom", CirculantBranch())]
    with pytest.raises(UserError, match=r"'tail/nrom' matches no module .*: tail/norm"):
        adapt(base("mlp"), rules, rngs=nnx.Rngs(1))


def test_updates_and_branches_meet_in_one_module():
    model, _ = adapt(base("mlp"), [Rule("blocks/1", LoRA())], rngs=nnx.Rngs(1))
    model, _ = adapt(model, [Rule("blocks/1", CirculantBranch())], name="second", rngs=nnx.Rngs(2))
    layer, x = model.blocks[1], jnp.ones((2, 10))
    layer.delta["default"].up[...] = jnp.ones((1, 4))
    updated = x @ (layer.kernel[...] + layer.delta["default"].matrix().to_dense())
    branch = layer.branch["second"]
    branch.down.r1[...], branch.bias[...] = jnp.arange(4.0), jnp.ones(4)
    np.testing.assert_allclose(layer(x), updated + branch.added(updated), rtol=1e-5)
    assert type(layer).__name__ == "BranchedAdaptedLinear"


# Which modules a branch can be added to


class Late(nnx.Module):
    """A model whose last layer, `a`, becomes the first one in copies, because copying sorts the attributes."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.z = nnx.Linear(4, 7, rngs=rngs)
        self.a = nnx.Linear(7, 5, rngs=rngs)

    def __call__(self, x, mask, gain=1.0):
        return gain * self.a(jnp.tanh(self.z(x)))


@pytest.mark.parametrize("copy", [lambda m: m, nnx.clone])
def test_the_width_of_a_branch_is_that_of_the_output_whatever_the_order_of_layers(copy):
    model, _ = adapt(copy(Late(rngs=nnx.Rngs(0))), [Rule("", CirculantBranch())], rngs=nnx.Rngs(1))
    assert model.branch["default"].down.shape == (5, 5)
    assert model(jnp.ones((2, 4)), None).shape == (2, 5)
    # The width is also found for a module that already has a branch.
    again, _ = adapt(copy(model), [Rule("", CirculantBranch())], name="second", rngs=nnx.Rngs(2))
    assert again.branch["second"].down.shape == (5, 5)


def test_widths_of_the_transformers_of_this_package():
    model, _ = adapt(base("deep"), [Rule(TARGETS["houlsby"], BottleneckBranch(waist=3))], rngs=nnx.Rngs(1))
    assert {part.down.shape for _, _, part, _ in iter_parts(model)} == {(12, 3)}
    assert {part.up.shape for _, _, part, _ in iter_parts(model)} == {(3, 12)}


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        (
            "mlp",
            "tail/norm",
            "^tail/norm cannot be adapted: the width of its output .* of a LayerNorm: target",
        ),
        ("mlp", "", "^the model cannot be adapted: the width of its output cannot be found"),
        (
            "attention",
            "query",
            r"^query cannot be adapted: its output has several feature axes \(2, 5\), but a branch",
        ),
        ("mlp", "blocks", r"'blocks' matches no module, only blocks \(List\)"),
    ],
)
def test_modules_that_no_branch_can_be_added_to_are_named(name, target, message):
    with pytest.raises(UserError, match=message):
        adapt(base(name), [Rule(target, CirculantBranch())], rngs=nnx.Rngs(1))


@pytest.mark.parametrize("slot", ["delta", "branch"])
def test_users_may_call_their_own_modules_as_we_call_ours(slot):
    """Check that a model, such as a residual network, may have modules of its own called `delta` or `branch`."""
    model = nnx.Dict({slot: nnx.Dict(query=nnx.Linear(4, 4, rngs=nnx.Rngs(0)))})
    adapted, adapter = adapt(model, [Rule(f"{slot}/query", LoRA())], rngs=nnx.Rngs(1))
    assert kinds(adapted) == {f"{slot}/query": "LowRank"}
    assert len(nnx.to_flat_state(nnx.split(adapted, adapter.trainable, ...)[1])) == 2
