"""Read a kernel with any number of axes as a matrix, or as several matrices.

A module multiplies its input by its kernel as in an equation of `jnp.einsum`, such as "btd,dnh->btnh". Letters that the
kernel shares only with the input (d) are the rows of a matrix. Letters that it shares only with the output (n, h) are
its columns. Letters that it shares with both are a batch, with one matrix for each entry, such as the experts e in
"bed,edf->bef".
"""

import dataclasses
import functools
import math
import string

import jax.numpy as jnp
from jaxtyping import Array, Float

from surm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Layout:
    """The matrices that the array of a parameter holds: one, or one for each entry of its batch axes.

    The array may have more leading axes than one layer, as those of layers that `nnx.vmap` made. Every layer of such a
    stack has its own matrices.

    Attributes:
        shape: The shape of the array in one layer.
        rows: The axes that become the rows of a matrix. They are flattened in this order.
        columns: The axes that become its columns.
        batch: The axes with one matrix for each entry.
        divided: The shape with which `rows`, `columns` and `batch` count the axes. It has the same size as `shape`. It
            differs where one axis of the array holds two of them, as the output features of a grouped convolution.
    """

    shape: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    batch: tuple[int, ...] = ()
    divided: tuple[int, ...] = ()

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape (in_features, out_features) of each matrix."""
        return self._size(self.rows), self._size(self.columns)

    @property
    def entries(self) -> tuple[int, ...]:
        """The number of matrices in one layer, as the tuple (entries,), or () if the array is one matrix."""
        return (self._size(self.batch),) if self.batch else ()

    def stack(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sizes of the leading axes that stack several layers in an array of a given shape.

        Raises:
            UserError: If the array is not a stack of such layers. The message is the end of a sentence.
        """
        lead = len(shape) - len(self.shape)
        if lead < 0 or shape[lead:] != self.shape:
            raise UserError(
                f"has the shape {shape}, but one layer has {self.shape} (the axes of a stack of layers must come first)"
            )
        return shape[:lead]

    def matrices(self, array: Float[Array, "..."]) -> Float[Array, "... in out"]:
        """Rearrange an array into its matrices, of shape (*stack, *entries, in_features, out_features)."""
        stack = self.stack(array.shape)
        array = array.reshape(*stack, *self._divided).transpose(self._order(len(stack)))
        return array.reshape(*stack, *self.entries, *self.matrix)

    def array(self, matrices: Float[Array, "... in out"]) -> Float[Array, "..."]:
        """Rearrange matrices into the array that holds them. This is the inverse of `matrices`."""
        stack = matrices.shape[: matrices.ndim - 2 - len(self.entries)]
        axes = (*self.batch, *self.rows, *self.columns)
        order = self._order(len(stack))
        array = matrices.reshape(*stack, *(self._divided[axis] for axis in axes))
        return array.transpose(sorted(range(len(order)), key=order.__getitem__)).reshape(*stack, *self.shape)

    @property
    def _divided(self) -> tuple[int, ...]:
        return self.divided or self.shape

    def _order(self, lead: int) -> tuple[int, ...]:
        return (*range(lead), *(lead + axis for axis in (*self.batch, *self.rows, *self.columns)))

    def _size(self, axes: tuple[int, ...]) -> int:
        return math.prod(self._divided[axis] for axis in axes)


@dataclasses.dataclass(frozen=True)
class Contraction:
    """The equation by which inputs and a kernel are multiplied, with one letter for each axis.

    Attributes:
        inputs: The letters of the input. They may hold an ellipsis, and so may the output.
        kernel: The letters of the kernel.
        output: The letters of the output.
    """

    inputs: str
    kernel: str
    output: str

    def __post_init__(self) -> None:
        of_kernel, others = set(self.kernel), set(self.inputs) | set(self.output)
        if "." in self.kernel:
            raise UserError("the kernel has an ellipsis in its equation, so that its axes are not known")
        if len(of_kernel) < len(self.kernel) or of_kernel - others:
            raise UserError(f"the equation {self} does not use each axis of the kernel once")
        if not self.rows:
            raise UserError(f"the equation {self} sums over no axis that the input and the kernel share")

    @classmethod
    @functools.cache
    def parse(cls, equation: str) -> "Contraction":
        """Return the contraction that an equation such as "btd,dnh->btnh" describes.

        Raises:
            UserError: If the equation does not contract an input and a kernel. The message is the end of a sentence.
        """
        equation = equation.replace(" ", "")
        operands, arrow, output = equation.partition("->")
        inputs, comma, kernel = operands.partition(",")
        if not arrow or not comma or "," in kernel:
            raise UserError(f"the equation {equation!r} does not have the form 'input,kernel->output'")
        return cls(inputs, kernel, output)

    def __str__(self) -> str:
        return f"'{self.inputs},{self.kernel}->{self.output}'"

    @property
    def rows(self) -> str:
        """The letters of the summed axes: those in the input and the kernel, but not in the output."""
        return "".join(c for c in self.kernel if c in self.inputs and c not in self.output)

    @property
    def columns(self) -> str:
        """The letters of the kernel's axes that the input does not have. They become axes of the output."""
        return "".join(c for c in self.kernel if c not in self.inputs)

    @property
    def batch(self) -> str:
        """The letters in the input, the kernel and the output. Each index of these axes has its own matrix."""
        return "".join(c for c in self.kernel if c in self.inputs and c in self.output)

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Return how an array of this shape, the kernel of one layer, holds matrices."""
        if len(shape) != len(self.kernel):
            raise UserError(f"the equation {self} does not fit a kernel of shape {shape}")
        rows, columns, batch = (tuple(map(self.kernel.index, part)) for part in (self.rows, self.columns, self.batch))
        return Layout(shape, rows, columns, batch)

    def of(self, ndim: int) -> "Contraction":
        """Return the contraction for an input with `ndim` axes, in which letters replace an ellipsis."""
        free = [c for c in string.ascii_letters if c not in self.inputs + self.kernel + self.output]
        letters = "".join(free[: max(0, ndim - len(self.inputs.replace("...", "")))])
        return Contraction(self.inputs.replace("...", letters), self.kernel, self.output.replace("...", letters))

    @property
    def kept(self) -> str:
        """The letters of the equation that only the input and the output share."""
        return "".join(c for c in dict.fromkeys(self.inputs) if c in self.output and c not in self.kernel)

    def vectors(self, x: Float[Array, "..."]) -> Float[Array, "... in"]:
        """Rearrange an input into vectors, of shape (*entries of the batch, *kept axes, in_features)."""
        one = self.of(x.ndim)
        x = _arranged(x, one.inputs, one.batch + one.kept + one.rows)
        return _joined(x, len(one.batch), len(one.rows))

    def results(self, y: Float[Array, "..."]) -> Float[Array, "... out"]:
        """Rearrange an output into vectors, of shape (*entries of the batch, *kept axes, out_features)."""
        one = self.of(y.ndim + len(self.inputs.replace("...", "")) - len(self.output.replace("...", "")))
        y = _arranged(y, one.output, one.batch + one.kept + one.columns)
        return _joined(y, len(one.batch), len(one.columns))

    def outputs(self, y: Float[Array, "... out"], kernel: tuple[int, ...]) -> Float[Array, "..."]:
        """Rearrange vectors back into an output. This is the inverse of `results`.

        Args:
            y: The vectors, of shape (*entries of the batch, *kept axes, out_features).
            kernel: The shape of the kernel in one layer.
        """
        sizes = dict(zip(self.kernel, kernel, strict=True))
        entries, kept = bool(self.batch), len(self.kept.replace(".", ""))
        lead = y.shape[entries : y.ndim - 1]
        one = self.of(len(lead) - kept + len(self.inputs.replace("...", ""))) if "." in self.inputs else self
        shape = (*(sizes[c] for c in one.batch), *lead, *(sizes[c] for c in one.columns))
        return _arranged(y.reshape(shape) if shape != y.shape else y, one.batch + one.kept + one.columns, one.output)


def _arranged(x: Array, before: str, after: str) -> Array:
    """Transpose an array from the order of letters `before` to `after`, and sum over letters that `after` lacks."""
    return x if before == after else jnp.einsum(f"{before}->{after}", x)


def _joined(x: Array, first: int, last: int) -> Array:
    """Flatten the first `first` axes of an array into one, and its last `last` axes into one."""
    lead = (math.prod(x.shape[:first]),) if first else ()
    shape = (*lead, *x.shape[first : x.ndim - last], math.prod(x.shape[x.ndim - last :]))
    return x if shape == x.shape else x.reshape(shape)
