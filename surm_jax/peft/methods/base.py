"""What a method is, and the registry of methods by name.

There are three kinds. An `Update` puts a structured matrix beside the kernels of linear layers. A `Bottleneck` adds a
small non-linear branch to the output of modules. A `Selection` brings nothing and trains a part of what is there.
Adding a method means one class in a file beside this one, imported in `__init__.py`, and an entry in
`tests/peft/cases.py`.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar

import jax

from surm_jax.errors import UserError, did_you_mean
from surm_jax.structured import StructuredMatrix, Sum

_KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a name"}

_LARGEST = 10**18
"""Of every number; what makes sense is far below. Beyond it sizes and floats overflow."""

METHODS: dict[str, type["Method"]] = {}
"""Every method by its name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """A method with its settings, which are numbers, booleans or names. Subclasses with a `name` are registered.

    A number must be finite and not 0, unless its field says otherwise by `at_least`, `below_one` or `one_of`.

    Attributes:
        target: the preset of the model that it is meant for, such as "qkv".
        learning_rate: a peak to start a search from, for Adam; tasks differ.
    """

    name: ClassVar[str]
    target: ClassVar[str] = ""
    learning_rate: ClassVar[float] = 1e-3

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            if hasattr(cls, "name"):
                raise UserError(f"{cls.__name__} needs a name of its own: {cls.name!r} is {METHODS[cls.name].__name__}")
            return  # a base class of methods
        if cls.name in METHODS:
            raise UserError(f"{cls.__name__} needs a name of its own: {cls.name!r} is {METHODS[cls.name].__name__}")
        METHODS[cls.name] = cls

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check(field, getattr(self, field.name))

    def choose(self, paths: list[str]) -> list[str]:
        """Returns those that get the method of the modules that a rule matches, by their paths; at least one.

        Raises:
            UserError: if the method's settings leave none.
        """
        return paths

    def _check(self, field: dataclasses.Field, value: Any) -> None:
        where, limits, kind = f"{self.name}.{field.name}", field.metadata, field.type
        if not (type(value) is kind or (kind is float and type(value) is int)):
            raise UserError(f"{where} must be {_KINDS[kind]}, got {value!r}")
        if kind in (int, float) and abs(value) > _LARGEST:
            raise UserError(f"{where} must be finite and at most {_LARGEST:g}, got {value}")
        if "one_of" in limits:
            if value not in limits["one_of"]:
                near = did_you_mean(str(value), limits["one_of"])
                raise UserError(f"{where} must be one of {', '.join(limits['one_of'])}, got {value!r}{near}")
        elif field.type in (bool, str) or (self._may_be_zero(field.name) and value == 0):
            pass
        elif "least" in limits:
            if not (value >= limits["least"] and value < limits["below"]):
                below = f" and below {limits['below']:g}" if math.isfinite(limits["below"]) else ""
                raise UserError(f"{where} must be at least {limits['least']}{below}, got {value}")
        elif kind is int and value < 1:
            raise UserError(f"{where} must be at least 1, got {value}")
        elif math.isnan(value) or value == 0:
            # With a factor of 0, or a random factor of 0 beside the one that starts at 0, nothing would ever learn.
            raise UserError(f"{where} must be finite and not 0, got {value}: it would never learn")

    def _may_be_zero(self, name: str) -> bool:
        del name
        return False


def at_least(default: float, least: float, below: float = math.inf) -> Any:
    """A setting of a method that may be anything from `least` on, and below `below`."""
    return dataclasses.field(default=default, metadata={"least": least, "below": below})


def one_of(default: str, names: tuple[str, ...]) -> Any:
    """A setting of a method that is one of some names."""
    return dataclasses.field(default=default, metadata={"one_of": names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update(Method):
    """A structured matrix beside a kernel: `W + alpha * unit * dW` (SURM, arXiv 2406.17740, section 4.1).

    Attributes:
        alpha: what the update is multiplied with.
        learn_alpha: whether alpha is trained too. It may then start at 0, and with it the update, whose matrix starts
            away from zero.
        dropout: probability of zeroing an entry of the update's input while training (`surm_jax.adapter_dropout`).
        frozen: names of the matrix's arrays that are not trained.
        zero: name of the array that is zero at the start; empty: the one that the matrix is linear in.
        normalized: whether the columns of the sum have learned norms (DoRA).
    """

    target: ClassVar[str] = "qkv"
    frozen: ClassVar[tuple[str, ...]] = ()
    zero: ClassVar[str] = ""
    normalized: ClassVar[bool] = False
    alpha: float = 1.0
    learn_alpha: bool = False
    dropout: float = at_least(0.0, 0, below=1)

    def _may_be_zero(self, name: str) -> bool:
        return name == "alpha" and self.learn_alpha

    def unit(self, shape: tuple[int, int]) -> float:
        """Returns the convention that multiplies `alpha * dW` at the given (in_features, out_features)."""
        del shape
        return 1.0

    def factor(self, shape: tuple[int, int]) -> float:
        """Returns the number that multiplies the matrix of the given (in_features, out_features)."""
        return self.alpha * self.unit(shape)

    def start(self, key: jax.Array, shape: tuple[int, int]) -> StructuredMatrix:
        """Returns the matrix that training starts from: as `init`, or away from zero where alpha starts at 0."""
        matrix = self.init(key, shape)
        if self.alpha:
            return matrix
        return _away_from_zero(matrix, jax.random.fold_in(key, 1), getattr(self, "scale", None), self.zero)

    @abc.abstractmethod
    def init(self, key: jax.Array, shape: tuple[int, int]) -> StructuredMatrix:
        """Returns the matrix of the given (in_features, out_features) that training starts from: zero as a product."""


def _away_from_zero(matrix: StructuredMatrix, key: jax.Array, scale: float | None, zero: str) -> StructuredMatrix:
    """Returns the matrix with random numbers in the array that is zero: `linear_in` unless `zero` names another."""
    if isinstance(matrix, Sum):
        keys = jax.random.split(key, len(matrix.terms))
        return Sum([_away_from_zero(term, k, scale, zero) for term, k in zip(matrix.terms, keys, strict=True)])
    arrays = matrix.arrays()
    name = zero or matrix.linear_in
    shape = arrays[name].shape
    return matrix.with_arrays(**{name: (scale or math.prod(shape) ** -0.5) * jax.random.normal(key, shape)})


ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "tanh": jax.numpy.tanh,
}
"""Non-linearities of bottlenecks. All of them map 0 to 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    """A branch added to the output X of a module: `X + act(X M) + b`, or `X + act(X D + d) U + b` through a waist.

    The first is SURM's adapter (arXiv 2406.17740, section 4.2), whose non-linearity comes after the whole matrix, so
    that its factors can be stored as one. The second is Houlsby's (arXiv 1902.00751).

    Attributes:
        alpha: what the branch is multiplied with.
        bias: whether b (and d) are there; they start at 0.
        activation: one of `ACTIVATIONS`.
        dropout: probability of zeroing an entry of the branch's input while training.
        waisted: whether there are two matrices, the first of them random at the start.
    """

    target: ClassVar[str] = "houlsby"
    waisted: ClassVar[bool] = False
    alpha: float = 1.0
    bias: bool = True
    activation: str = one_of("gelu", tuple(ACTIVATIONS))
    dropout: float = at_least(0.0, 0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation == "relu" and not self.waisted:
            # Its slope at 0, where x M starts, is 0 in JAX.
            raise UserError(f"{self.name}.activation=relu would never learn, since its matrix starts at zero: try gelu")

    @abc.abstractmethod
    def init_branch(self, key: jax.Array, width: int) -> tuple[StructuredMatrix, ...]:
        """Returns M, or D and U: the last of them zero as a product."""


class Selection(Method):
    """Trains parameters of the model itself.

    Attributes:
        patterns: of the paths of parameters, `re.fullmatch`.
    """

    patterns: ClassVar[tuple[str, ...]]


def make_method(name: str, settings: dict[str, Any]) -> Method:
    """Builds the registered method `name` with its settings.

    >>> from surm_jax.peft import make_method
    >>> make_method("lora", {"rank": 2}).rank
    2

    Raises:
        UserError: for an unknown name or setting, or a value that cannot be; the message names the nearest one.
    """
    if name not in METHODS:
        raise UserError(f"no method is called {name!r}{did_you_mean(name, METHODS)} (known: {', '.join(METHODS)})")
    known = [field.name for field in dataclasses.fields(METHODS[name])]
    for key in settings:
        if key not in known:
            raise UserError(f"{name} has no setting {key!r}{did_you_mean(key, known)} (known: {', '.join(known)})")
    return METHODS[name](**settings)
