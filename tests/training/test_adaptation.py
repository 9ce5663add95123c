"""What a configuration puts into a model: which modules get which method, by which rule, and how it is computed."""

import pytest
from flax import nnx

from surm_jax.models import ViT, ViTConfig
from surm_jax.peft import METHODS, CirculantUpdate, LoRA, Rule, iter_parts
from surm_jax.structured import EXECUTIONS
from surm_jax.training.parsing import base_config, parse
from surm_jax.training.setup import adapt_model
from tests.training import tiny

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
# What they leave of the target qkv.
LAST = Rule(r"blocks/\d+/attention/(query|key|value)", CirculantUpdate())
LEFT = {"blocks/0/attention/value", "blocks/1/attention/query", "blocks/1/attention/value"}
PLACES = {f"blocks/0/attention/{name}" for name in ("query", "key")}
PLACES |= {f"blocks/{block}/mlp/{name}" for block in (0, 1) for name in ("up", "down")}


def adapted(**values):
    """Returns the adapter, and its parts by path, of a ViT of two blocks without weights."""
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
