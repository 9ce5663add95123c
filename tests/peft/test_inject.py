import jax
import numpy as np
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.models.vit import TARGETS
from surm_jax.peft import CirculantUpdate, LoRA, Rule, adapt
from surm_jax.peft.delta import Adapted
from surm_jax.peft.inject import adapted_layers
from tests.peft.cases import EVERY, MLP, MODELS, UPDATE_CASES, base, fresh, materialize, parameters, same_bits, trained
from tests.peft.test_layers import ReadsKernel, stacked


def adapt_mlp(*rules, train=()):
    return adapt(base("mlp"), [Rule(target, LoRA()) for target in rules], train=train, rngs=nnx.Rngs(1))


def kinds(model):
    """The family of the update of every adapted layer, by path."""
    return {path: type(layer.delta.matrix()).__name__ for path, layer in adapted_layers(model)}


class Mixed(nnx.Module):
    """Layers that can be adapted beside others that cannot."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.stem = nnx.Conv(4, 4, kernel_size=(3,), rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.up = nnx.Linear(4, 4, rngs=rngs)
        self.experts = nnx.LinearGeneral(4, 4, batch_axis={0: 3}, rngs=rngs)
        self.reader = ReadsKernel(4, 4, rngs=rngs)


@pytest.mark.parametrize(("name", "update"), EVERY)
def test_the_layers_of_the_target_and_no_others_are_adapted(name, update):
    model, _ = fresh(name, update)
    assert [path for path, _ in adapted_layers(model)] == sorted(MODELS[name].shapes)
    for path, layer in adapted_layers(model):
        assert layer.delta.matrix().shape == MODELS[name].shapes[path]
        assert isinstance(layer, nnx.Linear | nnx.LinearGeneral)


@pytest.mark.parametrize(("name", "update"), EVERY)
def test_the_original_stays_as_it_was(name, update):
    original = materialize(MODELS[name].make)
    structure, before = nnx.graphdef(original), parameters(original)
    model, adapter = adapt(
        original, [Rule(MODELS[name].target, UPDATE_CASES[update].update)], train=MODELS[name].train, rngs=nnx.Rngs(1)
    )
    _, trainable, _ = nnx.split(model, adapter.trainable, ...)
    for _, variable in nnx.to_flat_state(trainable):
        variable[...] = variable[...] + 1
    nnx.update(model, trainable)
    assert nnx.graphdef(original) == structure
    after = parameters(original)
    assert after.keys() == before.keys()
    assert all(same_bits(before[path], after[path]) for path in before)


@pytest.mark.parametrize(("name", "update"), EVERY)
def test_both_models_hold_the_same_arrays(name, update):
    model, _ = fresh(name, update)
    arrays = {path: v[...] for path, v in nnx.to_flat_state(nnx.state(model))}
    for path, variable in nnx.to_flat_state(nnx.state(base(name))):
        assert arrays[path] is variable[...], path


def test_the_first_rule_that_matches_counts():
    rules = [Rule("blocks/0", LoRA(rank=1)), Rule(r"blocks/\d+", CirculantUpdate()), Rule(".*", LoRA(rank=2))]
    model, _ = adapt(base("mlp"), rules, rngs=nnx.Rngs(1))
    assert kinds(model) == {
        "blocks/0": "LowRank", "blocks/1": "CirculantPair", "head": "LowRank", "tail/gate": "LowRank"
    }  # fmt: skip
    assert (model.blocks[0].delta.matrix().rank, model.head.delta.matrix().rank) == (1, 2)


def test_a_pattern_may_match_other_modules_besides():
    model, _ = adapt(
        materialize(lambda: Mixed(rngs=nnx.Rngs(0))), [Rule("embed|stem|norm|up", LoRA())], rngs=nnx.Rngs(1)
    )
    assert kinds(model) == {"up": "LowRank"}
    assert type(model.stem) is nnx.Conv


def test_the_random_numbers_come_from_the_stream_params():
    def draw(seed):
        rules = [Rule("blocks/0", CirculantUpdate())]
        return np.asarray(adapt(base("mlp"), rules, rngs=nnx.Rngs(params=seed))[0].blocks[0].delta.r2[...])

    assert same_bits(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))


def test_an_abstract_model_is_adapted_without_arrays():
    model = nnx.eval_shape(lambda: adapt(MLP(rngs=nnx.Rngs(0)), [Rule(".*", LoRA())], rngs=nnx.Rngs(1))[0])
    assert [path for path, _ in adapted_layers(model)] == ["blocks/0", "blocks/1", "head", "tail/gate"]
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model)))


def test_no_rules_is_a_selection_alone():
    model, adapter = adapt(base("mlp"), [], train=["head/.*"], rngs=nnx.Rngs(1))
    assert nnx.graphdef(model) == nnx.graphdef(base("mlp"))
    assert adapter.train == ("head/.*",)


@pytest.mark.parametrize(
    ("rules", "train", "message"),
    [
        (["blocks/0/kernel"], (), r"'blocks/0/kernel' matches no linear layer .*nearest of 4: blocks/0"),
        (["tail/gaet"], (), r"'tail/gaet' matches no linear layer .*nearest of 4: tail/gate"),
        ([r"blocks/\d+", "hed"], (), r"'hed' matches no linear layer .*nearest of 4: head"),
        (["tail/norm"], (), r"'tail/norm' matches no linear layer, only tail/norm \(LayerNorm\); .*head, tail/gate$"),
        (["blocks"], (), r"'blocks' matches no linear layer, only blocks \(List\)"),
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
        ("embed|stem|norm", r"only embed \(Embed\), .*stem \(Conv\).*; the linear layers are experts, reader, up"),
        ("experts", r"^experts cannot be adapted: its kernel has batch axes"),
        ("reader", r"^reader cannot be adapted: ReadsKernel\.__call__ does not call super"),
        ("up|experts", r"^experts cannot be adapted"),
    ],
)
def test_layers_that_cannot_be_adapted_are_named(target, message):
    with pytest.raises(UserError, match=message):
        adapt(materialize(lambda: Mixed(rngs=nnx.Rngs(0))), [Rule(target, LoRA())], rngs=nnx.Rngs(1))


def test_a_stack_of_layers_is_named():
    model = nnx.Dict(blocks=nnx.eval_shape(lambda: stacked(lambda rngs: nnx.Dict(up=nnx.Linear(4, 5, rngs=rngs)))))
    with pytest.raises(UserError, match=r"^blocks/up cannot be adapted: .*\(3, 4, 5\).*stack of layers"):
        adapt(model, [Rule("blocks/up", LoRA())], rngs=nnx.Rngs(1))


@pytest.mark.parametrize("rank", [-1, 5, 2.5])
def test_an_impossible_rank_is_named_with_the_layer(rank):
    with pytest.raises(UserError, match=rf"^blocks/1 cannot be adapted: .*10 x 4 .*from 1 to 4, but {rank} "):
        adapt(base("mlp"), [Rule("blocks/1", LoRA(rank=rank))], rngs=nnx.Rngs(1))


@pytest.mark.parametrize("target", [r"blocks/\d+", "head"])
def test_adapting_twice_is_refused(target):
    # The second adapter's file could hold neither the first one's recipe nor its base.
    model, _ = trained("mlp", "lora")
    with pytest.raises(UserError, match=r"^blocks/0 is adapted already: merge"):
        adapt(model, [Rule(target, LoRA())], rngs=nnx.Rngs(1))


def test_presets_of_the_vit_adapt_what_they_say():
    model, _ = adapt(base("digits"), [Rule(TARGETS["all-linear"], LoRA())], rngs=nnx.Rngs(1))
    assert len(kinds(model)) == 2 * 6
    assert not isinstance(model.head, Adapted)


def test_one_string_is_no_list_of_patterns():
    with pytest.raises(UserError, match=r"got one string: write \['head/\.\*'\]"):
        adapt_mlp("head", train="head/.*")
