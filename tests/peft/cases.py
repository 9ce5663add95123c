"""Models, updates and tolerances that the tests of this room share."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import nnx

from surm_jax.models import ViT, ViTConfig
from surm_jax.models.vit import TARGETS
from surm_jax.peft import C3A, Adapter, AdapterParam, CirculantUpdate, LoRA, Rule, Update, adapt

# Relative error of a whole output in the Euclidean norm, by the dtype that the model computes in.
TOLERANCES = {
    "float32": 1e-5,  # rounding is about 1e-7; FFTs, and sums over layers and features, add a factor of some tens
    "bfloat16": 2.0**-6,  # 8 bits: one rounding is 2^-9, and it happens at other places once the update is merged
}


@dataclasses.dataclass(frozen=True)
class UpdateCase:
    """What the suite knows of a registered update.

    Attributes:
      update: an instance in which no setting has its default.
      zero: names of the arrays that start at zero; the others must not.
      stored: the arrays' shapes in a file, for a matrix of shape (m, n).
      dense: what is added to the kernel (in, out), from the arrays, by numpy or scipy and never by the code under test.
    """

    update: Update
    zero: frozenset[str]
    stored: Callable[[int, int], dict[str, tuple[int, ...]]]
    dense: Callable[[dict[str, np.ndarray], int, int], np.ndarray]


UPDATE_CASES = {
    "circulant": UpdateCase(
        CirculantUpdate(alpha=0.7, scale=0.5),
        frozenset({"r1"}),
        lambda m, n: {"c": (max(m, n),)},
        lambda arrays, m, n: 0.7 * scipy.linalg.circulant(arrays["r1"] * arrays["r2"]).T[:m, :n],
    ),
    "c3a": UpdateCase(
        C3A(alpha=3.0, block=2),
        frozenset({"c"}),
        lambda m, n: {"c": (m // 2, n // 2, 2)},
        lambda arrays, m, n: 3.0 / m * np.block([[scipy.linalg.circulant(c).T for c in row] for row in arrays["c"]]),
    ),
    "lora": UpdateCase(
        LoRA(alpha=0.6, rank=2),
        frozenset({"A"}),
        lambda m, n: {"A": (n, 2), "B": (m, 2)},
        lambda arrays, m, n: 0.3 * arrays["B"] @ arrays["A"].T,
    ),
}


class MLP(nnx.Module):
    """A user's model: layers in an `nnx.List` and an `nnx.Dict`, none of them square but one."""

    def __init__(self, *, classes: int = 3, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.blocks = nnx.List([nnx.Linear(6, 10, **options), nnx.Linear(10, 4, use_bias=False, **options)])
        self.tail = nnx.Dict(gate=nnx.Linear(4, 4, **options), norm=nnx.LayerNorm(4, dtype=jnp.float32, rngs=rngs))
        self.head = nnx.Linear(4, classes, **options)

    def __call__(self, x):
        for block in self.blocks:
            x = jnp.tanh(block(x))
        return self.head(self.tail.norm(x * self.tail.gate(x)))


class Gated(nnx.Linear):
    """A user's layer: a linear one with something before and after it, and an argument of its own."""

    def __call__(self, x, gain=1.5):
        return gain * jax.nn.relu(super().__call__(2.0 * x))


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """A model to adapt.

    Attributes:
      make: builds it.
      target: the pattern of the layers to adapt.
      shapes: their paths and matrices, (in_features, out_features).
      inputs: the shape of its input.
      train: patterns of what is trained besides.
      precision: the dtype that it computes in.
    """

    make: Callable[[], nnx.Module]
    target: str
    shapes: dict[str, tuple[int, int]]
    inputs: tuple[int, ...]
    train: tuple[str, ...] = ()
    precision: str = "float32"


# Few sizes in all, since each one is compiled for.
MLP_SHAPES = {"blocks/0": (6, 10), "blocks/1": (10, 4), "tail/gate": (4, 4)}
ATTENTION_SHAPES = {"query": (6, 10), "value": (6, 10), "out": (10, 4)}
MLP_TARGET = r"blocks/\d+|tail/gate"
HEAD = ("head/.*",)

MODELS = {
    "mlp": ModelCase(lambda: MLP(rngs=nnx.Rngs(0)), MLP_TARGET, MLP_SHAPES, (2, 3, 6), HEAD),
    "bfloat16_compute": ModelCase(
        lambda: MLP(dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), MLP_TARGET, MLP_SHAPES, (2, 3, 6), HEAD, "bfloat16"
    ),
    "bfloat16_kernels": ModelCase(
        lambda: MLP(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
        MLP_TARGET,
        MLP_SHAPES,
        (2, 3, 6),
        HEAD,
        "bfloat16",
    ),
    "attention": ModelCase(
        lambda: nnx.MultiHeadAttention(2, 6, 10, out_features=4, decode=False, rngs=nnx.Rngs(0)),
        "query|value|out",
        ATTENTION_SHAPES,
        (2, 3, 6),
    ),
    "own_call": ModelCase(lambda: Gated(6, 4, rngs=nnx.Rngs(0)), "", {"": (6, 4)}, (2, 3, 6)),
    # The kernel's first axis belongs to the input's axis 1, although `axis` names the last one first.
    "axes": ModelCase(
        lambda: nnx.LinearGeneral((2, 5), (2, 2), axis=(-1, 1), rngs=nnx.Rngs(0)), "", {"": (10, 4)}, (2, 2, 3, 5)
    ),
    "digits": ModelCase(
        lambda: ViT(ViTConfig.from_variant("digits", num_classes=10, depth=2), rngs=nnx.Rngs(0)),
        TARGETS["qv"],
        {f"blocks/{i}/attention/{name}": (64, 64) for i in range(2) for name in ("query", "value")},
        (2, 8, 8, 1),
        HEAD,
    ),
}

# Two updates meet every kind of layer, all others three models: what is new in those is their matrix and its start.
EVERY = [
    (model, update)
    for model in MODELS
    for update in UPDATE_CASES
    if update in ("circulant", "lora") or model in ("mlp", "bfloat16_kernels", "digits")
]


def materialize(make: Callable[[], nnx.Module]) -> nnx.Module:
    """Builds a model with NumPy's random numbers, the same in every process, without compiling its initialisers."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(0)
    flat = [
        (path, v.replace(jnp.asarray(0.4 * rng.normal(size=v.shape), v.dtype))) for path, v in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


@functools.cache
def base(name: str) -> nnx.Module:
    """The base model of a case: shared by the tests, which must not change it."""
    return materialize(MODELS[name].make)


@functools.cache
def inputs(name: str) -> jax.Array:
    """The input of a case, in the dtype that its model computes in."""
    x = np.random.default_rng(1).normal(size=MODELS[name].inputs)
    return jnp.asarray(x, MODELS[name].precision)


@functools.cache
def fresh(name: str, update: str) -> tuple[nnx.Module, Adapter]:
    """An adapted model at the start of training."""
    case = MODELS[name]
    rules = [Rule(case.target, UPDATE_CASES[update].update)]
    return adapt(base(name), rules, train=case.train, rngs=nnx.Rngs(1))


@functools.cache
def trained(name: str, update: str) -> tuple[nnx.Module, Adapter]:
    """An adapted model away from its start: every trainable number is another one."""
    model, adapter = fresh(name, update)
    return perturb(model, adapter), adapter


def perturb(model: nnx.Module, adapter: Adapter) -> nnx.Module:
    """Returns the model with noise on everything that the adapter trains."""
    graphdef, trainable, frozen = nnx.split(model, adapter.trainable, ...)
    rng = np.random.default_rng(2)
    noise = lambda a: jnp.asarray(np.asarray(a) + 0.3 * rng.normal(size=a.shape), a.dtype)  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(noise, trainable), frozen)


def parameters(model: nnx.Module) -> dict[str, np.ndarray]:
    """All parameters by path, updates included."""
    return {"/".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def update_parameters(model: nnx.Module) -> dict[str, np.ndarray]:
    """The parameters of updates by path."""
    flat = nnx.to_flat_state(nnx.state(model, AdapterParam))
    return {"/".join(map(str, path)): np.asarray(variable[...]) for path, variable in flat}


def dense_updates(name: str, update: str, model: nnx.Module) -> dict[str, np.ndarray]:
    """`factor * dW` of every adapted layer by path, in float64, by the oracle of the update."""
    case = UPDATE_CASES[update]
    result = {}
    for path, (m, n) in MODELS[name].shapes.items():
        prefix = f"{path}/delta/" if path else "delta/"
        arrays = {p.removeprefix(prefix): a.astype(np.float64) for p, a in update_parameters(model).items()
                  if p.startswith(prefix)}  # fmt: skip
        result[path] = case.dense(arrays, m, n)
    return result


def same_bits(left: jax.Array, right: jax.Array) -> bool:
    """Whether two arrays are the same in shape, dtype and every bit."""
    left, right = np.asarray(left), np.asarray(right)
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()


def relative_error(actual: jax.Array, expected: jax.Array) -> float:
    """The relative error in the Euclidean norm."""
    actual, expected = np.asarray(actual).astype(np.float64), np.asarray(expected).astype(np.float64)
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
