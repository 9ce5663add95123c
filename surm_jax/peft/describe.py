"""What is trained: a table of paths, shapes and counts."""

import dataclasses
import math

from flax import nnx

from surm_jax.paths import join
from surm_jax.peft.adapt import adapted_modules
from surm_jax.peft.adapter import Adapter
from surm_jax.peft.lifecycle import parts_of
from surm_jax.peft.parts.branch import Branch
from surm_jax.peft.parts.variables import AdapterParam


@dataclasses.dataclass(frozen=True)
class Row:
    """One part of an adapter, or one parameter trained besides.

    Attributes:
        path: the module's path, or the parameter's.
        shape: the shape of the matrix (in_features, out_features), or the parameter's.
        kind: the family of the matrix, or "trained".
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
        rows: parts of adapters and parameters trained besides.
        adapter: numbers trained in adapters.
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


def describe(model: nnx.Module, adapter: Adapter | None = None) -> Description:
    """Says what of an adapted model is trained. The model may be abstract (`nnx.eval_shape`): nothing is computed.

    >>> import surm_jax
    >>> model, adapter = surm_jax.adapt(
    ...     nnx.Linear(8, 8, rngs=nnx.Rngs(0)), [surm_jax.Rule("", surm_jax.CirculantUpdate())], rngs=nnx.Rngs(1)
    ... )
    >>> description = describe(model, adapter)
    >>> description.trainable, description.total
    (16, 88)

    Args:
        model: an adapted model.
        adapter: the one that is trained; `None`: all that the model has, and nothing besides.

    Raises:
        UserError: if the model has not the adapter.
    """
    parts = adapted_modules(model) if adapter is None else parts_of(model, adapter)
    rows = [Row(path, *_of(part)) for path, _, part, _ in parts]
    adapter_count = sum(row.trainable for row in rows)
    if adapter is not None:
        _, trained, _ = nnx.split(model, adapter.trainable, ...)
        for path, variable in nnx.to_flat_state(trained):
            if not isinstance(variable, AdapterParam):
                rows.append(Row(join(path), variable.shape, "trained", math.prod(variable.shape)))
    besides = sum(row.trainable for row in rows) - adapter_count
    total = sum(math.prod(variable.shape) for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)))
    return Description(tuple(rows), adapter_count, besides, total)


def _of(part: nnx.Module) -> tuple[tuple[int, int], str, int]:
    """Returns the shape, the family and the number of trained numbers of a part."""
    trained = sum(math.prod(v.shape) for v in part.tensors().values() if isinstance(v, AdapterParam))
    matrices = part.matrices() if isinstance(part, Branch) else (part.stored(),)
    return (matrices[0].shape[0], matrices[-1].shape[1]), type(matrices[0]).__name__, trained
