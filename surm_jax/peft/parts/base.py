"""The protocol of parts: what an adapter puts into one module.

A part sits in one of two slots. A `KernelPart` adds to the product of a linear layer with its kernel, such as
`x @ M` beside `x @ W`. An `OutputPart` adds to the output of any module, after it. Everything else in this package
(describing, merging, converting, saving, serving many adapters) asks a part by the methods stated here, so that a new
kind of part is one class in one file. `tests/peft/own_method.py` shows two.

A part scales what it adds by `scale`, which is 1 while it is trained and 0 where its adapter is switched off.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from surm_jax.errors import UserError
from surm_jax.paths import join
from surm_jax.structured import Dot, StructuredMatrix

KERNEL = "delta"
"""The slot of parts that add to the product of a linear layer with its kernel."""

OUTPUT = "branch"
"""The slot of parts that add to the output of a module."""

SLOTS = (KERNEL, OUTPUT)
"""Parts have the path `<module>/<slot>/<name of the adapter>`."""


class AdapterParam(nnx.Param):
    """A trained parameter of an adapter. This type selects what is trained; it is float32 over any base."""


class AdapterConstant(nnx.Variable):
    """Numbers of an adapter that are saved but not trained, such as the frozen factor of LoRA-FIX."""


class AdapterScale(nnx.Variable):
    """The factor of what a part adds, float32 of shape (): 1 as trained, 0 switched off. Never trained or saved."""


@dataclasses.dataclass(frozen=True)
class Place:
    """The place that a method builds a part for.

    Attributes:
        width: Number of output features of the module.
        kernel: The layer's kernel as a matrix (in_features, out_features); `None` in the output slot.
        parts: Number of equal blocks of output features in a packed kernel, such as 3 for query, key and value.
        which: Numbers of the blocks that get an update; empty means all.
        execution: How a structured product is computed, one of `surm_jax.structured.EXECUTIONS`.
    """

    width: int
    kernel: Array | None = None
    parts: int = 1
    which: tuple[int, ...] = ()
    execution: str = "auto"


class Part(nnx.Module):
    """What one adapter adds to one module.

    Every variable of a part except `scale` must be an `AdapterParam` or an `AdapterConstant`: these are saved, and
    the first kind is trained.

    Attributes:
        slot: `KERNEL` or `OUTPUT`.
        scale: The factor of what is added.
    """

    slot: ClassVar[str]

    def __init__(self) -> None:
        self.scale = AdapterScale(jnp.ones((), jnp.float32))

    @property
    def shape(self) -> tuple[int, int]:
        """The (in_features, out_features) of what the part computes."""
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """A word for tables, such as the family of the part's matrix."""
        return type(self).__name__

    def form(self) -> str:
        """Return a description of everything but the numbers, for messages."""
        return f"{self.kind} of shape {self.shape}"

    def tensors(self) -> dict[str, nnx.Variable]:
        """Return the variables that are saved, by their path inside the part."""
        state = nnx.state(self, nnx.Any(AdapterParam, AdapterConstant))
        return {join(path): variable for path, variable in nnx.to_flat_state(state)}

    def compact(self) -> None:
        """Replace the arrays, in place, by the smallest ones that compute the same: the form in files."""

    def change(self, kernel: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """Return what the part adds to a kernel, as a dense float32 matrix.

        Raises:
            UserError: If no kernel can hold what the part does; the message completes "the part".
        """
        return self.scale[...] * self._change(kernel)

    def multiple(self) -> tuple[float, StructuredMatrix]:
        """Return (c, M) of a part that adds `x @ (c * M)`, for formats that store both.

        Raises:
            UserError: If the part is something else; the message completes "the part".
        """
        raise UserError(f"is {self.kind}, not a multiple of one matrix")

    def fit(self, target: Float[np.ndarray, "in out"]) -> Float[np.ndarray, "in out"]:
        """Set the arrays so that `change` is nearest to a dense matrix, and return that change.

        Raises:
            UserError: If no such search is known.
        """
        del target
        raise UserError(f"no nearest {type(self).__name__} to a given change is known")

    def for_bank(self, kernel: Float[Array, "in out"] | None) -> "Part":
        """Return the part in the form that a bank stacks, with the same output.

        What depends only on the kernel can be computed here once. A bank calls parts without dropout.

        Args:
            kernel: The kernel that the part was trained beside; `None` in the output slot.
        """
        del kernel
        return nnx.clone(self)

    @classmethod
    def alike(cls, parts: Sequence[Self]) -> Sequence[Self]:
        """Return the parts of one module of a bank in one form, where they differ and can be brought to it."""
        return parts

    def _change(self, kernel: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """`change` without the scale."""
        raise NotImplementedError


class KernelPart(Part):
    """What one adapter adds to the product of a linear layer with its kernel."""

    slot = KERNEL

    reads_kernel: ClassVar[bool] = True
    """Whether what is added depends on the kernel, or on its product: merging another adapter would change it."""

    execution: str = "auto"
    """How structured products are computed, one of `surm_jax.structured.EXECUTIONS`."""

    def plain_matrix(self) -> StructuredMatrix | None:
        """Return M, scale included, if the part adds `x @ M` in this call and nothing else; otherwise `None`.

        Such matrices are summed, and computed together with the product of the kernel.
        """
        return None

    def added(
        self, x: Float[Array, "*batch in"], y: Float[Array, "*batch out"], kernel: Float[Array, "in out"], dot: Dot
    ) -> Float[Array, "*batch out"]:
        """Return what is added to `y = x @ kernel`, in its dtype.

        Args:
            x: Inputs of the layer, as vectors.
            y: Their product with the frozen kernel.
            kernel: The frozen kernel as a matrix.
            dot: How the layer multiplies inputs with a matrix.
        """
        return _scaled(self.scale, self._added(x, y, kernel, dot)).astype(y.dtype)

    def _added(self, x: Array, y: Array, kernel: Array, dot: Dot) -> Array:
        """`added` without the scale, in any floating dtype."""
        raise NotImplementedError


class OutputPart(Part):
    """What one adapter adds to the output of a module."""

    slot = OUTPUT

    def multiple(self) -> tuple[float, StructuredMatrix]:
        """Refuse: the part is not beside a kernel.

        Raises:
            UserError: Always.
        """
        raise UserError("is added to the output of the module, not beside a kernel")

    def added(self, y: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Return what is added to the output y, in its dtype."""
        return _scaled(self.scale, self._added(y)).astype(y.dtype)

    def _added(self, y: Array) -> Array:
        """`added` without the scale, in any floating dtype."""
        raise NotImplementedError

    def _change(self, kernel: Float[Array, "in out"]) -> Float[Array, "in out"]:
        raise UserError("is added to the output of the module and is not linear, so that no kernel can hold it")


def _scaled(scale: AdapterScale, added: Array) -> Array:
    return scale[...].astype(added.dtype) * added


class AttachedPart(NamedTuple):
    """One part in a model.

    Attributes:
        path: Path of the module.
        name: Name of the adapter.
        part: What the adapter put there.
        module: The module.
    """

    path: str
    name: str
    part: Part
    module: nnx.Module


def iter_parts(model: nnx.Module) -> Iterator[AttachedPart]:
    """Yield every part in a model, sorted by path and name."""
    found = []
    for path, module in nnx.iter_modules(model):
        if is_adapted(module):
            for slot in SLOTS:
                parts: Mapping[str, Part] = vars(module).get(slot, {})
                found += [AttachedPart(join(path), name, part, module) for name, part in parts.items()]
    yield from sorted(found, key=lambda row: row[:2])


def original_class(module: nnx.Module) -> type[nnx.Module]:
    """Return the class that a module had before any part was attached to it."""
    return getattr(type(module), "original_class", type(module))


def is_adapted(module: nnx.Module) -> bool:
    """Say whether a module has parts of adapters."""
    return hasattr(type(module), "original_class")


def is_abstract(module: nnx.Module) -> bool:
    """Say whether a module has shapes in the place of arrays (`nnx.eval_shape`)."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def adapter_of(path: tuple[Any, ...]) -> str | None:
    """Return the name of the adapter that a variable at an NNX path belongs to, or `None`.

    >>> adapter_of(("blocks", 0, "query", "delta", "default", "r1"))
    'default'
    """
    for length in range(len(path) - 1, 0, -1):  # from the end: the model may use the slot's word itself
        if path[length - 1] in SLOTS:
            return path[length]
    return None
