"""What an adapter trains: a table of paths, shapes and counts."""

import dataclasses
import math

from flax import nnx

from surm_jax.paths import join
from surm_jax.peft.adapter import Adapter
from surm_jax.peft.delta import AdapterParam
from surm_jax.peft.inject import adapted_layers
from surm_jax.peft.layers import matrix_view


@dataclasses.dataclass(frozen=True)
class Row:
    """One adapted layer, or one parameter trained besides.

    Attributes:
      path: the layer's path, or the parameter's.
      shape: the shape of the layer's matrix (in_features, out_features), or the parameter's.
      kind: the family of the update, or "trained".
      trainable: how many numbers are trained there.
    """

    path: str
    shape: tuple[int, ...]
    kind: str
    trainable: int


@dataclasses.dataclass(frozen=True)
class Description:
    """What is trained. `str()` of it is a table.

    Attributes:
      rows: adapted layers and parameters trained besides.
      adapter: numbers trained in updates.
      besides: numbers trained besides, such as the head's.
      total: all parameters of the adapted model.
    """

    rows: tuple[Row, ...]
    adapter: int
    besides: int
    total: int

    @property
    def trainable(self) -> int:
        """All numbers that are trained."""
        return self.adapter + self.besides

    def __str__(self) -> str:
        cells = [("path", "shape", "update", "trained")]
        cells += [(row.path, " x ".join(map(str, row.shape)), row.kind, f"{row.trainable:,}") for row in self.rows]
        widths = [max(len(line[column]) for line in cells) for column in range(4)]
        lines = [
            f"{path:<{widths[0]}}  {shape:<{widths[1]}}  {kind:<{widths[2]}}  {count:>{widths[3]}}"
            for path, shape, kind, count in cells
        ]
        lines.insert(1, "-" * len(lines[0]))
        share = 100 * self.trainable / max(self.total, 1)
        lines.append(
            f"trainable: {self.trainable:,} of {self.total:,} parameters ({share:.3f} %):"
            f" {self.adapter:,} in updates, {self.besides:,} in other parameters"
        )
        return "\n".join(lines)


def describe(model: nnx.Module, adapter: Adapter) -> Description:
    """Says what of an adapted model is trained. The model may be abstract (`nnx.eval_shape`): nothing is computed.

    >>> import surm_jax
    >>> model, adapter = surm_jax.adapt(
    ...     nnx.Linear(8, 8, rngs=nnx.Rngs(0)), [surm_jax.Rule("", surm_jax.CirculantUpdate())], rngs=nnx.Rngs(1)
    ... )
    >>> description = describe(model, adapter)
    >>> description.trainable, description.total
    (16, 88)
    """
    rows = [
        Row(
            path,
            matrix_view(layer, path).shape,
            type(layer.delta.empty).__name__,
            sum(math.prod(getattr(layer.delta, name).shape) for name in layer.delta.names),
        )
        for path, layer in adapted_layers(model)
    ]
    adapter_count = sum(row.trainable for row in rows)
    _, trained, _ = nnx.split(model, adapter.trainable, ...)
    for path, variable in nnx.to_flat_state(trained):
        if not isinstance(variable, AdapterParam):
            rows.append(Row(join(path), variable.shape, "trained", math.prod(variable.shape)))
    besides = sum(row.trainable for row in rows) - adapter_count
    total = sum(math.prod(variable.shape) for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)))
    return Description(tuple(rows), adapter_count, besides, total)
