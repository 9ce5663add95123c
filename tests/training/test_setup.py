"""Check which errors are found before compilation, and which method each module gets."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.models import ViT, ViTConfig
from surm_jax.peft import METHODS, CirculantUpdate, LoRA, Rule, iter_parts
from surm_jax.structured import EXECUTIONS
from surm_jax.training.parsing import base_config, parse
from surm_jax.training.setup import adapt_model, describe_config, describe_model, prepare
from tests.training import tiny


def refusal(files, method="circulant", **values):
    with pytest.raises(UserError) as error:
        prepare(tiny.make_config(files, method, **values), 0)
    return str(error.value)


def test_what_is_prepared(tiny_files):
    job = prepare(tiny.make_config(tiny_files, **{"data.holdout": 7, "model.dropout": 0.1, "mesh.data": 4}), 3)
    task = job.task
    assert (len(task.dataset.train), len(task.holdout), len(task.dataset.test)) == (33, 7, 21)
    assert task.model_config == ViTConfig(**tiny.GEOMETRY, num_classes=3, dropout=0.1)
    assert (job.seed, job.mesh.shape) == (3, {"data": 4, "fsdp": 1})
    assert task.checkpoint == tiny_files / "weights.safetensors"
    assert prepare(tiny.make_config(tiny_files), 3).task.holdout is None


def test_a_part_of_the_data(tiny_files):
    values = {"data.classes": ("2", "0"), "data.train_examples": 9, "data.holdout": 4, "mesh.data": 4}
    config = tiny.make_config(tiny_files, **values)
    task = prepare(config, 3).task
    assert (task.classes, task.model_config.num_classes) == (("2", "0"), 2)
    # The class "1" is left out. 7 of the 21 test examples belong to it.
    assert (task.examples, len(task.holdout), len(task.dataset.test)) == (5, 4, 14)
    assert task.dataset.test.labels.tolist() == [1, 0] * 7
    # `describe_config`, which loads no weights, also finds that the new head has two outputs.
    assert task.make_model(0).head.bias.shape == (2,)
    assert describe_config(config).other == 2 * 10 + 2


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"peft.target": "blocks/0/attention/qeury"}, ["qeury", "blocks/0/attention/query"]),
        ({"peft.target": "qvk"}, ["qvk", "layer with a kernel", "did you mean 'qv' or 'qkv'"]),
        ({"peft.target": r"blocks/\d+/attention"}, ["no layer with a kernel", "blocks/0/attention (Attention)"]),
        ({"peft.train": ("haed/.*",)}, ["haed", "head/bias"]),
        ({"peft.lora.rank": 11, "peft.method": "lora"}, ["blocks/0/attention/key cannot be adapted", "rank"]),
        ({"data.batch_size": 20}, ["config.data.batch_size", "20", "8 devices", "16 or 24"]),
        ({"optim.accumulate": 4}, ["config.data.batch_size / config.optim.accumulate=4", "8 devices"]),
        ({"data.eval_batch_size": 9}, ["config.data.eval_batch_size=9", "8 or 16"]),
        ({"mesh.data": 9}, ["config.mesh", "data=9", "8"]),
        ({"data.name": "nowhere/data.npz"}, ["no data file", "nowhere/data.npz"]),
        ({"data.name": "cifar10", "data.dir": "/nowhere"}, ["cifar10", "/nowhere"]),
        ({"data.holdout": 40}, ["hold out 40", "40"]),
        ({"data.train_examples": 41}, ["cannot train on 41", "40"]),
        ({"data.train_examples": 10, "data.holdout": 10}, ["hold out 10", "10"]),
        ({"data.classes": ("0", "20")}, ["no class '20'", "did you mean '2' or '0'"]),
        ({"model.num_classes": 4}, ["config.model.num_classes=4", "asks for 3"]),
        ({"model.variant": "mini"}, ["1 channel", "reads 3"]),
        ({"model.image_size": 10}, ["patch", "10"]),
        ({"model.checkpoint": "digts"}, ["no checkpoint 'digts'", "did you mean 'digits'"]),
        ({"model.checkpoint": "augreg"}, ["no official AugReg checkpoint", "tiny"]),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_compiled(tiny_files, values, parts):
    method = values.pop("peft.method", "circulant")
    message = refusal(tiny_files, method, **values)
    assert [part for part in parts if part not in message] == []
    assert "\n" not in message


def test_heads_that_do_not_divide_the_width(tiny_files):
    assert "got 3 heads for width 10" in refusal(tiny_files, **{"model.heads": 3})


@pytest.mark.parametrize("split", ["train", "test"])
def test_numbers_that_are_not_finite_are_refused_when_loaded(tiny_files, tmp_path, split):
    arrays = dict(np.load(tiny_files / "data.npz"))
    for name in ("train_images", "test_images"):
        arrays[name] = arrays[name].astype(np.float32) / 127.5 - 1
    arrays[f"{split}_images"][5, 1, 2, 0] = np.nan
    np.savez(tmp_path / "nan.npz", **arrays)
    message = refusal(tiny_files, **{"data.name": str(tmp_path / "nan.npz")})
    assert f"{split}_images[5, 1, 2, 0] is nan" in message


@pytest.mark.parametrize("name", ["data.npz", "weights.safetensors"])
def test_files_that_were_cut_off_are_told(tiny_files, tmp_path, name):
    content = (tiny_files / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    key = {"data.npz": "data.name", "weights.safetensors": "model.checkpoint"}[name]
    with pytest.raises(UserError, match=str(tmp_path / name)):
        prepare(tiny.make_config(tiny_files, **{key: str(tmp_path / name)}), 0).base_model()


def test_random_weights_come_with_a_warning(tiny_files):
    with pytest.warns(UserWarning, match="RANDOM weights"):
        prepare(tiny.make_config(tiny_files, **{"model.checkpoint": "none"}), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(tiny.make_config(tiny_files), 0)


def test_seeds_share_the_base_and_draw_their_own_updates(tiny_files):
    config = tiny.make_config(tiny_files, "lora")
    zero, again, one = (tiny.build(config, seed) for seed in (0, 0, 1))
    tiny.assert_equal_bits(tiny.host(zero.frozen), tiny.host(one.frozen))
    tiny.assert_equal_bits(tiny.host(zero.trained), tiny.host(again.trained))
    drawn = [name for name, array in tiny.host(zero.trained).items() if "delta" in name and array.any()]
    assert len(drawn) == 3
    values = [tiny.host(built.trained)[name] for built in (zero, one) for name in drawn]
    assert len({value.tobytes() for value in values}) == 6


def test_describing_makes_no_weights():
    config = base_config()
    config.peft.method = "lora"
    config.peft.lora.rank = 2
    before = sum(array.size for array in jax.live_arrays())
    vit = ViTConfig.from_variant("B/16", num_classes=10)
    description = describe_model(parse(config), lambda seed: ViT(vit, rngs=nnx.Rngs(seed)))
    # The parameters of the adapter are allocated, but not the 86 million weights of the base model.
    assert sum(array.size for array in jax.live_arrays()) - before < 200_000
    assert description.adapter == 12 * 3 * 2 * 2 * 768
    assert description.other == 768 * 10 + 10


def test_a_preset_and_its_pattern_are_the_same(tiny_files):
    preset = tiny.make_config(tiny_files, **{"peft.target": "qv"})
    pattern = dataclasses.replace(preset.peft, target=r"blocks/\d+/attention/(query|value)")
    vit = ViTConfig(**tiny.GEOMETRY, num_classes=3)
    make_model = lambda seed: ViT(vit, rngs=nnx.Rngs(seed))  # noqa: E731
    described = describe_model(preset, make_model)
    assert [row.path for row in described.rows if row.kind != "trained"] == [
        "blocks/0/attention/query",
        "blocks/0/attention/value",
    ]
    assert described == describe_model(dataclasses.replace(preset, peft=pattern), make_model)


GIVEN = (
    {"target": "blocks/0/attention/(query|key)", "method": "lora", "settings": {"rank": 3}},
    {"target": "blocks/1/attention/key"},
    {"target": "mlp", "method": "lora", "parts": 2, "which": (1,)},
)
RULES = (
    Rule("blocks/0/attention/(query|key)", LoRA(rank=3)),
    Rule("blocks/1/attention/key", None),
    Rule(r"blocks/\d+/mlp/(up|down)", LoRA(rank=1), parts=2, which=(1,)),
)
# The rule that `config.peft.target` = "qkv" adds after `RULES`. So it applies only to the modules in `LEFT`, which no
# rule in `RULES` matches.
LAST = Rule(r"blocks/\d+/attention/(query|key|value)", CirculantUpdate())
LEFT = {"blocks/0/attention/value", "blocks/1/attention/query", "blocks/1/attention/value"}
PLACES = {f"blocks/0/attention/{name}" for name in ("query", "key")}
PLACES |= {f"blocks/{block}/mlp/{name}" for block in (0, 1) for name in ("up", "down")}


def adapted(**values):
    """Adapt a ViT of two blocks without allocating its weights. Return the `Adapter` and its parts by module path.

    Args:
        **values: Values of the section `config.peft`, by key.
    """
    config = base_config()
    config.update_from_flattened_dict({f"peft.{key}": value for key, value in values.items()})
    vit = ViTConfig(**{**tiny.GEOMETRY, "depth": 2}, num_classes=3)
    model, adapter = adapt_model(nnx.eval_shape(lambda: ViT(vit, rngs=nnx.Rngs(0))), parse(config).peft, 0)
    return adapter, {path: part for path, _, part, _ in iter_parts(model)}


@pytest.mark.parametrize(
    ("method", "target", "last", "left", "train"),
    [
        ("circulant", "qkv", (LAST,), LEFT, ()),
        ("circulant", "none", (), set(), ()),
        ("norm_tuning", "none", (), set(), METHODS["norm_tuning"].patterns),
    ],
)
def test_rules_come_before_the_target_which_may_be_none(method, target, last, left, train):
    adapter, parts = adapted(rules=GIVEN, method=method, target=target)
    assert adapter.rules == (*RULES, *last)
    assert adapter.train == ("head/.*", *train)
    assert parts.keys() == PLACES | left
    assert parts["blocks/0/attention/key"].up.shape == (3, 10)
    assert {path for path, part in parts.items() if hasattr(part, "r1")} == left


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_every_update_is_computed_as_the_configuration_says(execution):
    _, parts = adapted(rules=GIVEN, execution=execution)
    assert {part.execution for part in parts.values()} == {execution}
