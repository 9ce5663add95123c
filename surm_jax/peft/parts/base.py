"""The protocol of parts. A part is what an adapter adds to one module.

A part sits in one of two slots. A `KernelPart` adds a term to the product of a linear layer's input and kernel, such as
`x @ M` to `x @ W`. An `OutputPart` adds a term to the output of any module. All other code of this package uses parts
only through the methods defined here. A new kind of part is therefore one class in one file; `tests/peft/own_method.py`
shows two examples.

Every part multiplies the term that it adds by its `scale`. The scale is 1 during training, and 0 if the adapter is
switched off.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from surm_jax.errors import UserError
from surm_jax.paths import join
from surm_jax.structured import Dot, StructuredMatrix

KERNEL = "delta"
"""The name of the slot for parts that add a term to the product of a linear layer's input and kernel."""

OUTPUT = "branch"
"""The name of the slot for parts that add a term to the output of a module."""

SLOTS = (KERNEL, OUTPUT)
"""The names of the slots. A part has the path `<module>/<slot>/<name of the adapter>`."""


class AdapterParam(nnx.LoRAParam):
    """A trained parameter of an adapter. NNX filters select it by this type. It is float32 in a model of any dtype."""


class AdapterConstant(nnx.Variable):
    """An array of an adapter that is saved but not trained, such as the frozen factor of LoRA-FIX."""


class AdapterScale(nnx.Variable):
    """The scalar float32 factor of the term that a part adds: 1 as trained, 0 if switched off.

    It is neither trained nor saved.
    """


@dataclasses.dataclass(frozen=True)
class Place:
    """What a method needs to know of a module in order to build a part for it.

    Attributes:
        width: The number of output features of the module.
        kernel: The layer's kernel as a matrix (in_features, out_features). It is `None` for the output slot.
        parts: The number of equal blocks into which the output features of a packed kernel are divided, such as 3 for a
            kernel that holds query, key and value.
        which: The indices of the blocks that get an update. An empty tuple means all blocks.
        execution: How structured products are computed, one of `surm_jax.structured.EXECUTIONS`.
    """

    width: int
    kernel: Array | None = None
    parts: int = 1
    which: tuple[int, ...] = ()
    execution: str = "auto"


class Part(nnx.Module):
    """The term that one adapter adds to one module, with the variables from which it is computed.

    Every variable of a part except `scale` must be an `AdapterParam`, which is trained and saved, or an
    `AdapterConstant`, which is only saved.

    Attributes:
        slot: `KERNEL` or `OUTPUT`.
        scale: The factor by which the added term is multiplied.
    """

    slot: ClassVar[str]

    parameter: str = ""
    """The name of the parameter at which the part is, if a rule names a parameter instead of a module."""

    axes: str = ""
    """The letters with which the rule says how this parameter is a matrix (`Rule.axes`)."""

    def __init__(self) -> None:
        self.scale = AdapterScale(jnp.ones((), jnp.float32))

    @property
    def stack(self) -> tuple[int, ...]:
        """The shape of the stack if this is a stack of parts (`over_stack`), or () for one part."""
        return self.scale.get_value().shape

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of input and output features of the part, (in_features, out_features)."""
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """A short description of the part for tables, such as the name of its matrix family."""
        return type(self).__name__

    def form(self) -> str:
        """Return a description of the part for messages: its structure, without the values of its arrays."""
        return f"{self.kind} of shape {self.shape}"

    def tensors(self) -> dict[str, nnx.Variable]:
        """Return the variables that adapter files store, by their path inside the part."""
        state = nnx.state(self, nnx.Any(AdapterParam, AdapterConstant))
        return {join(path): variable for path, variable in nnx.to_flat_state(state)}

    def compact(self) -> None:
        """Replace the arrays, in place, by the smallest ones with the same result, which adapter files store."""

    def change(self, kernel: Float[Array, "*stack in out"]) -> Float[Array, "*stack in out"]:
        """Return the change of the kernel that would have the same effect as the part, as a dense float32 matrix.

        For a stack of parts, the result is a stack of such matrices.

        Raises:
            UserError: If no change of the kernel has this effect. The message is the end of a sentence that begins with
                "the part".
        """
        return over_stack(lambda part, kernel: part.scale[...] * part._change(kernel), self, kernel)

    def multiple(self) -> tuple[float, StructuredMatrix]:
        """Return (c, M) if the part adds `x @ (c * M)`, for file formats that store a factor and a matrix.

        Raises:
            UserError: If the part adds something else. The message is the end of a sentence that begins with "the
                part".
        """
        raise UserError(f"is {self.kind}, not a multiple of one matrix")

    def fit(self, target: Float[np.ndarray, "in out"]) -> Float[np.ndarray, "in out"]:
        """Set the arrays so that the result of `change` is as near as possible to `target`, and return this result.

        Raises:
            UserError: If no method to find such arrays is implemented for this kind of part.
        """
        del target
        raise UserError(f"{type(self).__name__} has no method to approximate a given change")

    def for_bank(self, kernel: Float[Array, "in out"] | None) -> "Part":
        """Return a copy of the part for `load_bank`, which stacks the arrays of the copies of several adapters.

        In a bank, where dropout is off, the copy adds the same term as the part. A subclass may use another class for
        the copy, and may compute values here, once, that depend on nothing but the part's arrays and the kernel.

        Args:
            kernel: The kernel of the layer that the part was trained in. It is `None` for the output slot.
        """
        del kernel
        return nnx.clone(self)

    @classmethod
    def alike(cls, parts: Sequence[Self]) -> Sequence[Self]:
        """Make the parts of several adapters equal in structure where possible, so that their arrays can be stacked.

        Args:
            parts: The parts of all adapters of a bank in one slot of one module, after `for_bank`.
        """
        return parts

    def _change(self, kernel: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """Return the change of the kernel before `change` multiplies it by the scale. Subclasses define it."""
        raise NotImplementedError


class KernelPart(Part):
    """What one adapter adds to the product of a linear layer's input and kernel."""

    slot = KERNEL

    reads_kernel: ClassVar[bool] = True
    """Whether the added term depends on the kernel or on `x @ kernel`, which merging another adapter changes."""

    execution: str = "auto"
    """How structured products are computed, one of `surm_jax.structured.EXECUTIONS`."""

    def plain_matrix(self) -> StructuredMatrix | None:
        """Return M if the part adds exactly `x @ M` in this call, otherwise `None`. M includes the scale.

        The layer passes the sum of all such M to `updated_matmul`, together with the kernel.
        """
        return None

    def added(
        self, x: Float[Array, "*batch in"], y: Float[Array, "*batch out"], kernel: Float[Array, "in out"], dot: Dot
    ) -> Float[Array, "*batch out"]:
        """Return the term that the part adds to `y = x @ kernel`, in the dtype of y.

        Args:
            x: The inputs of the layer, as vectors.
            y: The product of the inputs and the frozen kernel.
            kernel: The frozen kernel as a matrix.
            dot: The function with which the layer multiplies inputs and a matrix.
        """
        return _scaled(self.scale, self._added(x, y, kernel, dot)).astype(y.dtype)

    def _added(self, x: Array, y: Array, kernel: Array, dot: Dot) -> Array:
        """Return the added term before `added` multiplies it by the scale, in any floating dtype."""
        raise NotImplementedError

    def rows(
        self, ids: Int[Array, "*batch"], y: Float[Array, "*batch out"], kernel: Float[Array, "in out"]
    ) -> Float[Array, "*batch out"]:
        """Return what the part adds to rows of the kernel, such as the embeddings of tokens.

        Args:
            ids: The numbers of the rows.
            y: The rows of the frozen kernel. The result has their dtype.
            kernel: The frozen kernel as a matrix.
        """
        return _scaled(self.scale, self._rows(ids, y, kernel)).astype(y.dtype)

    def _rows(self, ids: Array, y: Array, kernel: Array) -> Array:
        """Compute `rows`, not yet multiplied by the scale. By default, the dense change is formed."""
        return self._change(kernel)[ids]


class OutputPart(Part):
    """What one adapter adds to the output of a module."""

    slot = OUTPUT

    def multiple(self) -> tuple[float, StructuredMatrix]:
        """Raise an error, because the part adds nothing to the product with a kernel.

        Raises:
            UserError: Always.
        """
        raise UserError("is added to the output of the module, not beside a kernel")

    def added(self, y: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Return the term that the part adds to the output y, in the dtype of y."""
        return _scaled(self.scale, self._added(y)).astype(y.dtype)

    def _added(self, y: Array) -> Array:
        """Return the added term before `added` multiplies it by the scale, in any floating dtype."""
        raise NotImplementedError

    def _change(self, kernel: Float[Array, "in out"]) -> Float[Array, "in out"]:
        raise UserError("is added to the output of the module and is not linear, so that no kernel can hold it")


def over_stack(function: Callable[..., Any], part: Part, *arrays: Array) -> Any:
    """Apply a function to a part, or to each part of a stack, and return the result or the stacked results.

    A module with several matrices in its kernel, such as a stack of layers made by `nnx.vmap`, has a stack of parts.
    This is one `Part` whose variables all have the leading axes of the stack. The methods of a part are written for a
    single part.

    Args:
        function: A function of one part and arrays, which returns arrays.
        part: A part or a stack of parts.
        *arrays: Arrays with the leading axes of the stack.
    """
    if not part.stack:
        return function(part, *arrays)
    graphdef, state = nnx.split(part)
    return jax.vmap(lambda state, *arrays: over_stack(function, nnx.merge(graphdef, state), *arrays))(state, *arrays)


def _scaled(scale: AdapterScale, added: Array) -> Array:
    return scale[...].astype(added.dtype) * added


class AttachedPart(NamedTuple):
    """A part that is attached to a module of a model.

    Attributes:
        path: The path of the module in the model, or of the parameter that a rule named.
        name: The name of the adapter that the part belongs to.
        part: The part.
        module: The module.
    """

    path: str
    name: str
    part: Part
    module: nnx.Module


def iter_parts(model: nnx.Module) -> Iterator[AttachedPart]:
    """Yield the parts of all adapters in a model, sorted by the path of the module and the name of the adapter."""
    found = []
    for path, module in nnx.iter_modules(model):
        if is_adapted(module):
            for slot in SLOTS:
                held: Mapping[str, Any] = vars(module).get(slot, {})
                for name, entry in held.items():
                    # An adapter has one part here, or one for each parameter that a rule named.
                    parts = {"": entry} if isinstance(entry, Part) else entry
                    for parameter, part in parts.items():
                        where = (*path, parameter) if parameter else path
                        found.append(AttachedPart(join(where), name, part, module))
    yield from sorted(found, key=lambda row: row[:2])


def original_class(module: nnx.Module) -> type[nnx.Module]:
    """Return the class that a module had before any part was attached to it."""
    return getattr(type(module), "original_class", type(module))


def is_adapted(module: nnx.Module) -> bool:
    """Return whether a part of any adapter is attached to a module."""
    return hasattr(type(module), "original_class")


def is_abstract(module: nnx.Module) -> bool:
    """Return whether a module holds `jax.ShapeDtypeStruct` instead of arrays, as after `nnx.eval_shape`."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def adapter_of(path: tuple[Any, ...]) -> str | None:
    """Return the name of the adapter that a variable at an NNX path belongs to, or `None`.

    >>> adapter_of(("blocks", 0, "query", "delta", "default", "r1"))
    'default'
    """
    for length in range(len(path) - 1, 0, -1):  # Search from the end: a module may be called like a slot.
        if path[length - 1] in SLOTS:
            return path[length]
    return None
