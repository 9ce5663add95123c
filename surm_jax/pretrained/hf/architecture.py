"""Names and array layouts of models in Hugging Face transformers and here, described once for reading and writing.

Checkpoints there name arrays by modules, such as `vit.encoder.layer.3.output.dense.weight`, and so do we:
`blocks/3/mlp/down/kernel`. An `Architecture` lists the pairs of module names once, each with the layout of its arrays.
Key rules, names for writing and module names for adapters all come from that list.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surm_jax.errors import UserError, did_you_mean
from surm_jax.models import Config, Model, model_class
from surm_jax.pretrained.normalization import Normalization
from surm_jax.pretrained.rules import KeyRule, Transform

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
"""Names of activations in Hugging Face transformers, mapped to ours. If several map to one of ours, the first is used
when writing."""


@dataclass(frozen=True)
class Tensor:
    """One array of a module in both layouts.

    Attributes:
        theirs: The last part of their name, such as "weight"; empty if the array belongs to no module.
        ours: The last part of our path, such as "kernel"; empty if the array belongs to no module.
        read: Converts their layout to ours, `(array, shape of our parameter) -> array`.
        write: Converts our layout to theirs.
        aliases: Other values of `theirs` that occur in files.
    """

    theirs: str
    ours: str
    read: Transform
    write: Callable[[np.ndarray], np.ndarray]
    aliases: tuple[str, ...] = ()


def _reshaped(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array of one axis in the wanted shape."""
    _require_shape(array, (math.prod(shape),))
    return array.reshape(shape)


def _require_shape(array: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise a `UserError` unless an array has the shape of their layout. Our shape is refused too."""
    if array.shape != shape:
        raise UserError(f"it has shape {array.shape}, not {shape}")


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1)


def linear(in_axes: int = 1) -> tuple[Tensor, ...]:
    """Return the arrays of a linear layer: weight (out, in) and bias (out,) there, (*in, *out) and (*out,) here.

    Args:
        in_axes: How many axes of our kernel belong to the input: 2 for the output projection of attention.
    """

    def read(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        _require_shape(array, (math.prod(shape[in_axes:]), math.prod(shape[:in_axes])))
        return array.T.reshape(shape)

    def write(kernel: np.ndarray) -> np.ndarray:
        return kernel.reshape(int(np.prod(kernel.shape[:in_axes])), -1).T

    return Tensor("weight", "kernel", read, write), Tensor("bias", "bias", _reshaped, _flat)


LINEAR = linear()
LINEAR_OUT = linear(in_axes=2)
"""The output projection of attention. Our kernel has shape (heads, width of a head, out)."""

NORM = (
    # Checkpoints that were converted from TensorFlow, such as the original BERT, say gamma and beta.
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
"""A convolution over images: weight (out, in, height, width) there, kernel (height, width, in, out) here."""

EMBEDDING = (Tensor("weight", "embedding", lambda array, shape: array, lambda table: table),)
ARRAY = (Tensor("", "", lambda array, shape: array, lambda array: array),)
"""A parameter that belongs to no layer and has the same shape on both sides."""

VECTOR = (Tensor("", "", _reshaped, _flat),)
"""A parameter that belongs to no layer and has one axis there and several here."""


@dataclass(frozen=True)
class Name:
    """The two names, theirs and ours, of a module or of a parameter outside modules. `#` is the number of a block.

    >>> Name("encoder.layer.#.output.dense", "blocks/#/mlp/down", LINEAR).theirs
    'encoder.layer.#.output.dense'

    Attributes:
        theirs: The module's name in checkpoints on the Hub. This name is written.
        ours: Its path here.
        tensors: Its arrays. A model may lack some of them, such as the bias.
        aliases: Other names that are read. If transformers has another name for the module in memory, it comes first.
        in_body: Whether the name begins with the prefix of the architecture.
    """

    theirs: str
    ours: str
    tensors: tuple[Tensor, ...]
    aliases: tuple[str, ...] = ()
    in_body: bool = True


@dataclass(frozen=True)
class Architecture:
    """One `model_type` of transformers.

    Attributes:
        model_type: What `config.json` calls it.
        prefix: What names in the body begin with, such as "vit.". Checkpoints of a model without a head lack it.
        model: Our class; it is built as `model(config, rngs=...)`.
        read_config: Returns our configuration, given their `config.json` and replacements of our fields. Raises a
            `UserError` for what our model cannot express.
        write_config: Returns their `config.json`, given our configuration. Raises a `UserError` for what they cannot
            express.
        names: Returns the pairs of names, given our configuration.
        ignore: Returns patterns of keys that are not read, without the prefix, given our configuration.
        fillers: Returns arrays by full name that are written although our model does not have them, given our
            configuration.
        chosen: Returns whether a model is written as this `model_type`, given our configuration; several types may
            share our class. May raise a `UserError` that says why a model cannot be written as any of them.
        normalization: The normalisation of pixels that the published models expect, for folders that do not give one.
    """

    model_type: str
    prefix: str
    model: type[Model]
    read_config: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
    write_config: Callable[[Any], dict[str, Any]]
    names: Callable[[Any], Sequence[Name]]
    ignore: Callable[[Any], Sequence[str]] = lambda config: ()
    fillers: Callable[[Any], dict[str, np.ndarray]] = lambda config: {}
    chosen: Callable[[Any], bool] = lambda config: True
    normalization: Normalization | None = None

    def key_rules(self, config: Any) -> list[KeyRule]:
        """Return the rules that read a checkpoint."""
        rules = []
        for name in self.names(config):
            prefix = f"(?:{re.escape(self.prefix)})?" if name.in_body else ""
            modules = "|".join(map(_pattern, (name.theirs, *name.aliases)))
            for tensor in name.tensors:
                suffix = f"\\.(?:{'|'.join((tensor.theirs, *tensor.aliases))})" if tensor.theirs else ""
                rules.append(KeyRule(f"{prefix}(?:{modules}){suffix}", _template(name, tensor), tensor.read))
        return rules

    def ignored(self, config: Any) -> list[str]:
        """Return the patterns of keys that are not read."""
        return [f"(?:{re.escape(self.prefix)})?{pattern}" for pattern in self.ignore(config)]

    def tensor_name(self, config: Any, path: str) -> tuple[str, Tensor]:
        """Return the name that checkpoints have for the array at a parameter path, and its layouts.

        Raises:
            UserError: The array has no name in checkpoints of this architecture.
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
"""The registered architectures by `model_type`, which can be read and written."""


def register_architecture(architecture: Architecture) -> None:
    """Make folders of one `model_type` readable and writable.

    Raises:
        UserError: An architecture of another model has this `model_type`.
    """
    other = ARCHITECTURES.get(architecture.model_type)
    if other is not None and other.model.__qualname__ != architecture.model.__qualname__:
        raise UserError(f"the model_type {architecture.model_type!r} already belongs to {other.model.__name__}")
    ARCHITECTURES[architecture.model_type] = architecture


def architecture_of(config: Config) -> Architecture:
    """Return the architecture that writes a model with this configuration.

    >>> from surm_jax.models import BertConfig, ViTConfig
    >>> architecture_of(ViTConfig.from_variant("digits", num_classes=10)).model_type
    'ijepa'
    >>> architecture_of(BertConfig.from_variant("tiny", positions="after_padding")).model_type
    'roberta'

    Raises:
        UserError: No registered architecture writes such a model.
    """
    model = model_class(config)
    for architecture in ARCHITECTURES.values():
        if architecture.model is model and architecture.chosen(config):
            return architecture
    raise UserError(f"no model_type of transformers is registered for a {model.__name__}: write it with save_model")


@dataclass(frozen=True)
class Names:
    """The names of one model's modules and arrays in an architecture, for adapters.

    Attributes:
        architecture: The architecture.
        config: The model's configuration.
    """

    architecture: Architecture
    config: Any

    def modules(self, path: str) -> tuple[str, ...]:
        """Return the names of the module at a path, its name in memory first; an empty tuple if it has none."""
        for name in self.architecture.names(self.config):
            match = re.fullmatch(_pattern(name.ours), path)
            if match and name.tensors[0].theirs:
                prefix = self.architecture.prefix if name.in_body else ""
                number = match[1] if match.groups() else ""
                return tuple(prefix + theirs.replace("#", number) for theirs in (*name.aliases, name.theirs))
        return ()

    def tensor(self, path: str) -> tuple[str, Tensor]:
        """Return the name that checkpoints have for the array at a parameter path, and its layouts.

        Raises:
            UserError: The array has no name in checkpoints of this architecture.
        """
        return self.architecture.tensor_name(self.config, path)


def refusal(model_type: str, name: str, value: Any, what: str) -> UserError:
    """Return the error for a `config.json` that our model cannot express."""
    return UserError(f"this {model_type} cannot be read: config.json says {name} = {value!r}, but {what}")


def our_activation(model_type: str, theirs: Any) -> str:
    """Return our name of an activation.

    Raises:
        UserError: We have no such activation.
    """
    if not isinstance(theirs, str) or theirs not in ACTIVATIONS:
        known = f"there are {', '.join(map(repr, ACTIVATIONS))}{did_you_mean(str(theirs), ACTIVATIONS)}"
        raise refusal(model_type, "hidden_act", theirs, known)
    return ACTIVATIONS[theirs]


def _pattern(name: str) -> str:
    """Return the regular expression of a name; the number of a block, if there is one, is a group."""
    return re.escape(name).replace(r"\#", r"(\d+)")


def _template(name: Name, tensor: Tensor) -> str:
    path = f"{name.ours}/{tensor.ours}" if tensor.ours else name.ours
    # Each name has its own group for the number. Only the group of the name that matches is set; others expand to
    # nothing.
    return path.replace("#", "".join(f"\\{group}" for group in range(1, 2 + len(name.aliases))))
