import functools

import jax
import pytest
from flax import nnx

from surm_jax.models import TARGETS, ViT, ViTConfig
from surm_jax.peft import Adapter, CirculantUpdate, LoRA, Rule, adapt, describe, iter_parts
from surm_jax.peft.describe import Row
from tests.peft.cases import fresh, trained
from tests.peft.models import MLP, MODELS, base

BASE_SIZE = 85_798_656  # The number of parameters of ViT-B/16 without its head.


@functools.cache
def vit_b16():
    """Return an abstract ViT-B/16 with 1,000 classes."""
    return nnx.eval_shape(lambda: ViT(ViTConfig.from_variant("B/16", num_classes=1000), rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("update", "target", "trained", "stored"),
    [
        (CirculantUpdate(), "qkv", 55_296, 27_648),
        (CirculantUpdate(), "qv", 36_864, 18_432),
        (LoRA(), "qkv", 55_296, 55_296),
        (LoRA(), "qv", 36_864, 36_864),
        (LoRA(rank=4), "qkv", 221_184, 221_184),
        (LoRA(rank=8), "qkv", 442_368, 442_368),
        (LoRA(rank=16), "qkv", 884_736, 884_736),
    ],
)
def test_golden_counts_of_vit_b16(update, target, trained, stored):
    model, adapter = adapt(vit_b16(), [Rule(TARGETS[target], update)], train=["head/.*"], rngs=nnx.Rngs(1))
    description = describe(model, adapter)
    assert (description.adapter, description.other) == (trained, 769_000)
    assert description.trainable == trained + 769_000
    assert description.total == BASE_SIZE + 769_000 + trained
    assert (
        sum(jax.eval_shape(lambda m: m.compact(), delta.stored()).num_params for _, _, delta, _ in iter_parts(model))
        == stored
    )
    layers = [row for row in description.rows if row.kind != "trained"]
    assert {row.shape for row in layers} == {(768, 768)}
    assert len(layers) == 12 * {"qkv": 3, "qv": 2}[target]


def test_rows_name_layers_and_parameters():
    assert describe(*fresh("mlp", "circulant")).rows == (
        Row("blocks/0", (6, 10), "CirculantPair", 20),
        Row("blocks/1", (10, 4), "CirculantPair", 20),
        Row("tail/gate", (4, 4), "CirculantPair", 8),
        Row("head/bias", (3,), "trained", 3),
        Row("head/kernel", (4, 3), "trained", 12),
    )


def test_counts():
    description = describe(*fresh("mlp", "lora"))
    lora = 2 * sum(m + n for m, n in MODELS["mlp"].shapes.values())
    weights = 6 * 10 + 10 + 10 * 4 + 4 * 4 + 4 + 2 * 4 + 4 * 3 + 3
    assert (description.adapter, description.other, description.trainable) == (lora, 15, lora + 15)
    assert description.total == weights + lora


def test_the_matrix_of_a_layer_of_higher_rank_is_shown():
    assert [(row.path, row.shape) for row in describe(*fresh("attention", "lora")).rows] == [
        ("out", (10, 4)), ("query", (6, 10)), ("value", (6, 10))
    ]  # fmt: skip


def test_a_selection_has_no_updates():
    description = describe(base("mlp"), Adapter((), (".*",)))
    assert (description.adapter, description.other) == (0, description.total)


def test_the_table():
    lines = str(describe(*fresh("mlp", "circulant"))).splitlines()
    assert lines[0].split() == ["path", "shape", "update", "trained"]
    assert set(lines[1]) == {"-"}
    assert lines[2].split() == ["blocks/0", "6", "x", "10", "CirculantPair", "20"]
    assert lines[5].split() == ["head/bias", "3", "trained", "3"]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[-1] == "trainable: 63 of 201 parameters (31.343 %): 48 in updates, 15 in other parameters"


def test_nothing_trained_is_no_error():
    nothing = describe(nnx.eval_shape(lambda: MLP(rngs=nnx.Rngs(0))), Adapter(()))
    assert (nothing.trainable, nothing.rows) == (0, ())
    assert "0 of 153 parameters (0.000 %)" in str(nothing)


def test_branches_constants_and_names():
    rows = {row.path: row for row in describe(fresh("mlp", "bottleneck")[0]).rows}
    assert rows["blocks/0"] == Row("blocks/0", (10, 10), "Dense", 2 * 10 * 3 + 3 + 10)
    assert describe(fresh("mlp", "circulant_adapter")[0]).rows[0] == Row("blocks/0", (10, 10), "CirculantPair", 30)
    # The frozen factor is not counted as a parameter.
    fixed = describe(*fresh("mlp", "lora_fix"))
    assert fixed.rows[0] == Row("blocks/0", (6, 10), "LowRank", 20)
    assert fixed.total == describe(base("mlp")).total + 2 * (10 + 4 + 4)
    both, second = adapt(trained("mlp", "lora")[0], [Rule("head", LoRA())], name="second", rngs=nnx.Rngs(1))
    assert [row.path for row in describe(both, second).rows] == ["head"]
    assert len(describe(both).rows) == 4
