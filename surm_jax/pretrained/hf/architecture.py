"""Map the modules and arrays of our models to those of Hugging Face transformers.

An array that transformers calls `vit.encoder.layer.3.output.dense.weight` has a parameter path such as
`blocks/3/mlp/down/kernel` in our model. An `Architecture` holds one list of such pairs of module names, with functions
that convert the arrays of each module. From this list come the rules for reading checkpoints, the names for writing
them, and the module names for adapters.

In this file, "their" and "theirs" refer to transformers, and "our" and "ours" to surm_jax.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surm_jax.errors import UserError, did_you_mean
from surm_jax.models import Config, Model, model_class
from surm_jax.preparation import Normalization
from surm_jax.pretrained.rules import KeyRule, Transform

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Our names of activations, by their names in transformers.

If several names in transformers stand for the same activation, the first of them is written.
"""


@dataclass(frozen=True)
class Tensor:
    """An array of a module: its name in transformers and in our model, and functions that convert its layout.

    Attributes:
        theirs: The last part of the array's name in transformers, such as "weight". It is empty if the array belongs to
            no module there.
        ours: The last part of the parameter's path, such as "kernel". It is empty if the parameter belongs to no module
            of ours.
        read: A function that converts their layout to ours, `(array, shape of our parameter) -> array`.
        write: A function that converts our layout to theirs, `array -> array`.
        aliases: Other values of `theirs` that occur in checkpoints. They are read, but not written.
    """

    theirs: str
    ours: str
    read: Transform
    write: Callable[[np.ndarray], np.ndarray]
    aliases: tuple[str, ...] = ()


def _reshaped(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Reshape an array with one dimension to the shape of our parameter."""
    _require_shape(array, (math.prod(shape),))
    return array.reshape(shape)


def _require_shape(array: np.ndarray, shape: tuple[int, ...]) -> None:
    """Check that an array in a checkpoint has the shape that transformers gives it. Otherwise raise a `UserError`.

    The shape of our parameter may be another one. An array of that other shape is refused too.
    """
    if array.shape != shape:
        raise UserError(f"it has shape {array.shape}, not {shape}")


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1)


def linear(in_axes: int = 1) -> tuple[Tensor, ...]:
    """Return one `Tensor` for the weight and one for the bias of a linear layer, to be listed in a `Name`.

    In transformers the weight has shape (out, in) and the bias has shape (out,). Our kernel has shape (*in, *out) and
    our bias has shape (*out,), where the input and the output may have several axes.

    Args:
        in_axes: The number of axes of our kernel that belong to the input. It is 2 for the output projection of
            attention, whose input axes are the heads and the features of a head.
    """

    def read(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        _require_shape(array, (math.prod(shape[in_axes:]), math.prod(shape[:in_axes])))
        return array.T.reshape(shape)

    def write(kernel: np.ndarray) -> np.ndarray:
        return kernel.reshape(int(np.prod(kernel.shape[:in_axes])), -1).T

    return Tensor("weight", "kernel", read, write), Tensor("bias", "bias", _reshaped, _flat)


LINEAR = linear()
LINEAR_OUT = linear(in_axes=2)
"""The arrays of the output projection of attention. Our kernel has shape (heads, width of a head, out)."""

NORM = (
    # Checkpoints that were converted from TensorFlow, such as the original BERT, use the names gamma and beta.
    Tensor("weight", "scale", _reshaped, _flat, aliases=("gamma",)),
    Tensor("bias", "bias", _reshaped, _flat, aliases=("beta",)),
)
CONV = (
    Tensor(
        "weight",
        "kernel",
        lambda array, shape: array.transpose(2, 3, 1, 0) if array.ndim == 4 else array,
        lambda kernel: kernel.transpose(3, 2, 0, 1),
    ),
    Tensor("bias", "bias", _reshaped, _flat),
)
"""The arrays of a convolution over images.

The weight in transformers has shape (out, in, height, width), and our kernel has shape (height, width, in, out).
"""

EMBEDDING = (Tensor("weight", "embedding", lambda array, shape: array, lambda table: table),)
ARRAY = (Tensor("", "", lambda array, shape: array, lambda array: array),)
"""An array that belongs to no module and has the same shape in transformers and in our model."""

VECTOR = (Tensor("", "", _reshaped, _flat),)
"""An array that belongs to no module. It has one dimension in transformers and several in our model."""


@dataclass(frozen=True)
class Name:
    """A module: its name in transformers, its path in our model, and its arrays.

    It may also describe a single array that belongs to no module. `#` stands for the number of a block:

    >>> Name("encoder.layer.#.output.dense", "blocks/#/mlp/down", LINEAR).theirs
    'encoder.layer.#.output.dense'

    Attributes:
        theirs: The module's name in checkpoints on the Hub. This name is written.
        ours: The module's path in our model.
        tensors: The module's arrays. A model may lack some of them, such as the bias.
        aliases: Other names of the module that are read. The first is the attribute path of the module in a loaded
            transformers model, if that differs from `theirs`.
        in_body: Whether the architecture's `prefix` is put before `theirs` and the aliases. It is false for heads.
    """

    theirs: str
    ours: str
    tensors: tuple[Tensor, ...]
    aliases: tuple[str, ...] = ()
    in_body: bool = True


@dataclass(frozen=True)
class Architecture:
    """How models of one `model_type` of transformers are read and written.

    Attributes:
        model_type: The value of `model_type` in `config.json`.
        prefix: The beginning of all names in the model's body, such as "vit.". Checkpoints of a model without a head
            lack this prefix.
        model: Our class of the model, which is built as `model(config, rngs=...)`.
        read_config: A function `(content of config.json, overrides of our fields) -> our configuration`. It raises a
            `UserError` if our class has no such model.
        write_config: A function `our configuration -> content of config.json`. It raises a `UserError` if transformers
            has no such model.
        names: A function from our configuration to a `Name` for each module.
        ignore: A function from our configuration to regular expressions for keys that are not read, without the prefix.
        fillers: A function from our configuration to arrays that checkpoints need but our model lacks, by full name.
            They are written with the model.
        chosen: A function from our configuration to whether a model is written as this `model_type`. It is needed if
            models of our class can be written as several types. It may raise a `UserError` if the model fits none.
        normalization: The normalisation of pixels that the published models expect. It is used for folders without the
            settings of an image processor.
        processor: The class of the image processor in transformers, for settings that do not name it.
    """

    model_type: str
    prefix: str
    model: type[Model]
    read_config: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
    write_config: Callable[[Any], dict[str, Any]]
    names: Callable[[Any], Sequence[Name]]
    ignore: Callable[[Any], Sequence[str]] = lambda config: ()
    copies: Callable[[Any], Mapping[str, str]] = lambda config: {}
    fillers: Callable[[Any], dict[str, np.ndarray]] = lambda config: {}
    chosen: Callable[[Any], bool] = lambda config: True
    normalization: Normalization | None = None
    processor: str = "ViTImageProcessor"

    def key_rules(self, config: Any) -> list[KeyRule]:
        """Return the rules that map the keys of a checkpoint to the parameters of a model with this configuration."""
        rules = []
        for name in self.names(config):
            prefix = f"(?:{re.escape(self.prefix)})?" if name.in_body else ""
            modules = "|".join(map(_pattern, (name.theirs, *name.aliases)))
            for tensor in name.tensors:
                suffix = f"\\.(?:{'|'.join((tensor.theirs, *tensor.aliases))})" if tensor.theirs else ""
                rules.append(KeyRule(f"{prefix}(?:{modules}){suffix}", _template(name, tensor), tensor.read))
        return rules

    def ignored(self, config: Any) -> list[str]:
        """Return regular expressions for the keys of a checkpoint that are not read."""
        return [f"(?:{re.escape(self.prefix)})?{pattern}" for pattern in self.ignore(config)]

    def tensor_name(self, config: Any, path: str) -> tuple[str, Tensor]:
        """Return the full name in checkpoints of the parameter at a path, and the `Tensor` that describes it.

        Raises:
            UserError: The parameter has no name in checkpoints of this architecture.
        """
        for name in self.names(config):
            for tensor in name.tensors:
                ours = f"{name.ours}/{tensor.ours}" if tensor.ours else name.ours
                if match := re.fullmatch(_pattern(ours), path):
                    module = self._full(name).replace("#", match[1] if match.groups() else "#")
                    return f"{module}.{tensor.theirs}" if tensor.theirs else module, tensor
        raise UserError(f"{path} has no name in transformers' {self.model_type}")

    def _full(self, name: Name) -> str:
        return self.prefix + name.theirs if name.in_body else name.theirs


ARCHITECTURES: dict[str, Architecture] = {}
"""The registered architectures by `model_type`. Folders of these types can be read and written."""


def register_architecture(architecture: Architecture) -> None:
    """Register an architecture, so that folders of its `model_type` can be read and written.

    Raises:
        UserError: An architecture with another class of models is registered for this `model_type`.
    """
    other = ARCHITECTURES.get(architecture.model_type)
    if other is not None and other.model.__qualname__ != architecture.model.__qualname__:
        raise UserError(f"the model_type {architecture.model_type!r} already belongs to {other.model.__name__}")
    ARCHITECTURES[architecture.model_type] = architecture


def architecture_of(config: Config) -> Architecture:
    """Return the architecture that a model with this configuration is written as.

    A ViT without a class token, such as the variant "digits", is written as I-JEPA. A Bert whose positions are counted
    as in RoBERTa is written as RoBERTa:

    >>> from surm_jax.models import BertConfig, ViTConfig
    >>> architecture_of(ViTConfig.from_variant("digits", num_classes=10)).model_type
    'ijepa'
    >>> architecture_of(BertConfig.from_variant("tiny", positions="after_padding")).model_type
    'roberta'

    Raises:
        UserError: No registered architecture has such a model.
    """
    model = model_class(config)
    for architecture in ARCHITECTURES.values():
        if architecture.model is model and architecture.chosen(config):
            return architecture
    raise UserError(f"no model_type of transformers is registered for a {model.__name__}: write it with save_model")


@dataclass(frozen=True)
class Names:
    """The names that transformers gives to the modules and arrays of one model, for reading and writing adapters.

    Attributes:
        architecture: The architecture that the model is written as.
        config: The model's configuration.
    """

    architecture: Architecture
    config: Any

    def modules(self, path: str) -> tuple[str, ...]:
        """Return the names that transformers gives to the module at a path.

        The first is the attribute path of the module in a loaded transformers model, and the last the name in
        checkpoints, if that differs. The result is empty if transformers has no such module.
        """
        for name in self.architecture.names(self.config):
            match = re.fullmatch(_pattern(name.ours), path)
            if match and name.tensors[0].theirs:
                prefix = self.architecture.prefix if name.in_body else ""
                number = match[1] if match.groups() else ""
                return tuple(prefix + theirs.replace("#", number) for theirs in (*name.aliases, name.theirs))
        return ()

    def tensor(self, path: str) -> tuple[str, Tensor]:
        """Return the full name in checkpoints of the parameter at a path, and the `Tensor` that describes it.

        Raises:
            UserError: The parameter has no name in checkpoints of this architecture.
        """
        return self.architecture.tensor_name(self.config, path)


def refusal(model_type: str, name: str, value: Any, what: str) -> UserError:
    """Return the error for a `config.json` with a model that our class cannot represent.

    Args:
        model_type: The value of `model_type` in the file.
        name: The name of the field that is the reason.
        value: The value of the field.
        what: A clause that says why our class cannot represent the model.
    """
    return UserError(f"this {model_type} cannot be read: config.json says {name} = {value!r}, but {what}")


def our_activation(model_type: str, theirs: Any) -> str:
    """Return our name of an activation, given its name in transformers.

    Raises:
        UserError: Our models have no such activation.
    """
    if not isinstance(theirs, str) or theirs not in ACTIVATIONS:
        known = f"there are {', '.join(map(repr, ACTIVATIONS))}{did_you_mean(str(theirs), ACTIVATIONS)}"
        raise refusal(model_type, "hidden_act", theirs, known)
    return ACTIVATIONS[theirs]


def _pattern(name: str) -> str:
    """Return the regular expression for a name. `#` becomes a group that matches the number of the block."""
    return re.escape(name).replace(r"\#", r"(\d+)")


def _template(name: Name, tensor: Tensor) -> str:
    path = f"{name.ours}/{tensor.ours}" if tensor.ours else name.ours
    # In the rule's expression, each alternative name has its own group for the number of the block. Only the group of
    # the name that matches is set. The references to the other groups expand to empty strings.
    return path.replace("#", "".join(f"\\{group}" for group in range(1, 2 + len(name.aliases))))
