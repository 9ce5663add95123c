"""The arithmetic of docs/scale.md, against models, adapters and compiled programs."""

import jax
import pytest
from flax import nnx

from benchmarks import plan, scale
from benchmarks.hlo import collectives
from surm_jax.models import TARGETS, ViT, ViTConfig
from surm_jax.peft import Rule, adapt, make_method


def numbers(model):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_numbers_are_those_of_the_model():
    config = ViTConfig.from_variant("B/16", num_classes=1000)
    abstract = nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))
    assert plan.MODELS["ViT-B/16"].numbers == numbers(abstract) == 86_567_656
    # https://arxiv.org/abs/2307.09288 calls it 7 B; its checkpoints hold 6,738,415,616 numbers.
    assert plan.MODELS["decoder, 7 B"].numbers == 6_738_415_616


@pytest.mark.parametrize(("method", "settings"), [("circulant", {}), ("lora", {"rank": 16})])
def test_trained_numbers_are_those_of_the_adapter(method, settings):
    config = ViTConfig.from_variant("B/16", num_classes=1000)

    def adapted():
        model = ViT(config, rngs=nnx.Rngs(0))
        return adapt(model, [Rule(TARGETS["qkv"], make_method(method, settings))], rngs=nnx.Rngs(0))[0]

    before = numbers(nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0))))
    assert plan.trained_numbers(plan.MODELS["ViT-B/16"], method) == numbers(nnx.eval_shape(adapted)) - before


@pytest.mark.parametrize(("method", "mesh"), [("lora", (2, 4)), ("full", (8, 1))])
def test_compiled_programs_hold_and_send_what_the_formulas_say(method, mesh):
    # optax mixes its counter with floats.
    with jax.numpy_dtype_promotion("standard"):
        (row,) = scale.check_rows([method], [mesh])
    assert row["arguments, compiled"] == row["arguments, formula"]
    # Loss, accuracy and what else is reduced with the gradient: some numbers.
    assert 0 <= row["reduced, compiled"] - row["reduced, formula"] <= 64
    if mesh[1] == 1:
        assert row["gathered, compiled"] == row["gathered, formula"] == 0
    else:
        # The backward pass ends before the patches and Q, K and V of the first block.
        left_out = 4 * (3 * 8**2 * 256 + 3 * 256**2)
        assert row["gathered, compiled"] == row["gathered, formula"] - left_out


def test_a_plan_splits_the_base_as_little_as_it_must():
    chip, model = plan.CHIPS["TPU v5e"], plan.MODELS["decoder, 7 B"]
    alone, eight = (plan.plan(model, "circulant", chip, chips) for chips in (1, 8))
    assert not alone.fits
    assert eight.fits and eight.fsdp > 1
    assert not plan.Plan(model, "circulant", chip, 8, eight.fsdp // 2).fits
    assert eight.seconds >= eight.compute_seconds + eight.update_seconds


def test_reading_collectives():
    hlo = """
  %a = (f32[4,2]{1,0}, u8[3]{0}) all-reduce-start(%x, %y)
  %b = bf16[8]{0} all-gather(%z)
  %c = f32[] add(%p, %q)
"""
    assert collectives(hlo) == [("all-reduce", (8, 3), 35), ("all-gather", (8,), 16)]
