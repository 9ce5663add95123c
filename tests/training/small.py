"""Build a small ViT or BERT, adapted with any method, and a batch, without data set, files or `Job`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from surm_jax.models import Bert, BertConfig, ViT, ViTConfig
from surm_jax.peft import Adapter, AdapterScale
from surm_jax.tasks import Glue, ImageClassification
from surm_jax.training.parsing import base_config, parse
from surm_jax.training.setup import adapt_model
from surm_jax.training.step import Batch, Forward

KINDS = ("vit", "bert")
BATCH, DEPTH = 16, 2
# Settings of methods whose default values do not fit a model of width 16 with two blocks.
VALUES = {
    "c3a": {"peft.c3a.block": 8},
    "adapter_drop": {"peft.adapter_drop.skip": 1},
    "lokr": {"peft.lokr.rank": 2},
    "compacter": {"peft.compacter.reduction": 4},
    "structured": {"peft.structured.family": "CirculantPair + LowRank"},
    # A lower frequency than the default, which would magnify rounding errors from step to step.
    "sine_lora": {"peft.sine_lora.omega": 2.0},
}


class Small(NamedTuple):
    model: nnx.Module
    adapter: Adapter
    forward: Forward
    batch: Batch


def build(kind: str, method: str, values: dict[str, Any] | None = None, **fields: Any) -> Small:
    """Build a small adapted model and a batch.

    Each call returns new copies of the arrays, because a test may delete or donate them.

    Args:
        kind: One of `KINDS`.
        method: The name of a method in `surm_jax.peft.METHODS`.
        values: Further values of the run's configuration, by dotted key.
        **fields: Fields of the model's configuration, such as `depth`.
    """
    graphdef, state, adapter = _built(kind, method, tuple((values or {}).items()), tuple(fields.items()))
    model = nnx.merge(graphdef, jax.tree.map(jnp.array, state))
    rng = np.random.default_rng(2)
    batch = {"label": np.arange(BATCH, dtype=np.int32) % 3}
    if kind == "vit":
        return Small(model, adapter, ImageClassification.forward, batch | {"image": _normal(rng, BATCH, 8, 8, 1)})
    tokens = rng.integers(0, 30, (BATCH, 5), np.int32)
    texts = {"tokens": tokens, "token_types": tokens % 2, "token_mask": np.arange(5) < rng.integers(2, 6, (BATCH, 1))}
    return Small(model, adapter, Glue.forward, batch | texts)


@functools.cache
def _built(kind: str, method: str, values: tuple, fields: tuple) -> tuple[nnx.GraphDef, Any, Adapter]:
    config = base_config()
    config.update_from_flattened_dict({"peft.method": method, **VALUES.get(method, {}), **dict(values)})
    # Set all parameters to random values. With initial values, one of the two factors of an update gets no gradient,
    # which would hide mistakes.
    model, adapter = adapt_model(nnx.eval_shape(_MAKERS[kind](**dict(fields))), parse(config).peft, 0)
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(1)

    def values(variable: nnx.Variable) -> np.ndarray:
        if isinstance(variable, AdapterScale):
            return np.ones((), np.float32)
        return (0.3 * _normal(rng, *variable.shape)).astype(variable.dtype)

    flat = [(path, variable.copy(values(variable))) for path, variable in nnx.to_flat_state(state)]
    return graphdef, nnx.from_flat_state(flat), adapter


def _vit(**fields: Any) -> Callable[[], ViT]:
    sizes = {"image_size": 8, "channels": 1, "patch_size": 4, "width": 16, "depth": DEPTH, "heads": 2, "mlp_width": 24}
    config = ViTConfig(num_classes=3, **{**sizes, **fields})
    return lambda: ViT(config, rngs=nnx.Rngs(0))


def _bert(**fields: Any) -> Callable[[], Bert]:
    sizes = {"vocab_size": 30, "max_positions": 9, "width": 16, "depth": DEPTH, "heads": 2, "mlp_width": 24}
    config = BertConfig(num_classes=3, type_vocab_size=2, **{**sizes, **fields})
    return lambda: Bert(config, rngs=nnx.Rngs(0))


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


_MAKERS = {"vit": _vit, "bert": _bert}
