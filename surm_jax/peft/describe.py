"""A table of the trained parameters: paths, shapes and counts."""

import dataclasses
import math

from flax import nnx

from surm_jax.paths import join
from surm_jax.peft.adapter import Adapter
from surm_jax.peft.kernels import kind_of
from surm_jax.peft.kernels.parameter import ParameterKind
from surm_jax.peft.lifecycle import parts_of
from surm_jax.peft.parts.base import KERNEL, AdapterParam, AttachedPart, Part, iter_parts
from surm_jax.peft.parts.stacks import one_of

AT_PARAMETER = " at the parameter"
"""The words that follow the kind of an update that is added to the parameter, and not to a product."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table: a part of an adapter, or another trained parameter.

    Attributes:
        path: The path of the module or the parameter.
        shape: The shape of the part, (in_features, out_features), or of the parameter. For a stack of parts, the shape
            of the stack comes first.
        kind: The kind of the part, such as the family of its matrix, or "trained" for a parameter.
        trainable: The number of trained parameters in this row.
    """

    path: str
    shape: tuple[int, ...]
    kind: str
    trainable: int


@dataclasses.dataclass(frozen=True)
class Description:
    """A summary of the trained parameters. Its `str()` is a table.

    Attributes:
        rows: A row for each part of an adapter, followed by a row for each other trained parameter.
        adapter: The number of trained parameters in the parts of adapters.
        other: The number of trained parameters of the base model, such as those of the head.
        total: The number of all parameters of the adapted model, trained or not.
    """

    rows: tuple[Row, ...]
    adapter: int
    other: int
    total: int

    @property
    def trainable(self) -> int:
        """The number of all trained parameters."""
        return self.adapter + self.other

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
            f" {self.adapter:,} in updates, {self.other:,} in other parameters"
        )
        if any(row.kind.endswith(AT_PARAMETER) for row in self.rows):
            lines.append("an update at the parameter forms the whole sum W + M in every call of its module")
        return "\n".join(lines)


def describe(model: nnx.Module, adapter: Adapter | None = None) -> Description:
    """Return a table of the trained parameters of an adapted model, which may be abstract (`nnx.eval_shape`).

    In this example, the kernel and the bias have 72 parameters, and the two vectors of the update have 16:

    >>> import surm_jax
    >>> model, adapter = surm_jax.adapt(
    ...     nnx.Linear(8, 8, rngs=nnx.Rngs(0)), [surm_jax.Rule("", surm_jax.CirculantUpdate())], rngs=nnx.Rngs(1)
    ... )
    >>> description = describe(model, adapter)
    >>> description.trainable, description.total
    (16, 88)

    Args:
        model: An adapted model.
        adapter: The adapter that is trained. With `None`, the table contains the parts of all adapters of the model,
            and no parameters of the base model.

    Raises:
        UserError: If the model does not have the adapter.
    """
    parts = iter_parts(model) if adapter is None else parts_of(model, adapter)
    rows = [_row(row) for row in parts]
    adapter_count = sum(row.trainable for row in rows)
    if adapter is not None:
        trained = nnx.filter_state(nnx.state(model), adapter.trainable)
        for path, variable in nnx.to_flat_state(trained):
            if not isinstance(variable, AdapterParam):
                rows.append(Row(join(path), variable.shape, "trained", math.prod(variable.shape)))
    other = sum(row.trainable for row in rows) - adapter_count
    total = sum(math.prod(variable.shape) for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)))
    return Description(tuple(rows), adapter_count, other, total)


def _row(row: AttachedPart) -> Row:
    one = one_of(row.part)
    at_parameter = row.part.parameter or isinstance(kind_of(row.module), ParameterKind)
    kind = f"{one.kind}{AT_PARAMETER}" if row.part.slot == KERNEL and at_parameter else one.kind
    return Row(row.path, (*row.part.stack, *one.shape), kind, _trained(row.part))


def _trained(part: Part) -> int:
    """Return how many parameters of a part are trained."""
    return sum(variable.get_value().size for variable in part.tensors().values() if isinstance(variable, AdapterParam))
