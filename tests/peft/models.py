"""The models, inputs, tolerances and helper functions that the tests of this folder share."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from surm_jax.models import TARGETS, Bert, BertConfig, ViT, ViTConfig
from surm_jax.peft import adapter_dropout
from surm_jax.peft.parts.base import AdapterConstant, AdapterParam

# The names of the two files of an adapter folder.
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

# The largest relative error of an output in the Euclidean norm, by the dtype in which the model computes.
TOLERANCES = {
    "float32": 1e-5,  # One rounding is about 1e-7. FFTs, and sums over layers and features, multiply this by some tens.
    "bfloat16": 2.0**-6,  # One rounding to 8 bits is 2^-9, and merging an update changes where a model rounds.
}


class MLP(nnx.Module):
    """A model as users may write it, with layers in an `nnx.List` and an `nnx.Dict`. Only one kernel is square."""

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
    """A linear layer as users may write it: `__call__` takes one more argument, and changes input and output."""

    def __call__(self, x, gain=1.5):
        return gain * jax.nn.relu(super().__call__(2.0 * x))


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """A base model for tests, with the facts that the tests need to adapt it.

    Attributes:
        make: A function that returns the model.
        target: A regular expression for the paths of the layers that get updates.
        shapes: The shapes of the kernels of these layers as matrices, (in_features, out_features), by path.
        inputs: The shape of the model's input.
        branch_target: A regular expression for the paths of the modules that get branches.
        widths: The number of output features of each of these modules, by path. It is empty if no test adds branches
            to the model.
        train: Regular expressions for the paths of the parameters that are trained along with the adapter.
        precision: The dtype in which the model computes.
        vocabulary: The number of different tokens, if the input consists of token ids. 0 means that the input consists
            of real numbers.
    """

    make: Callable[[], nnx.Module]
    target: str
    shapes: dict[str, tuple[int, int]]
    inputs: tuple[int, ...]
    branch_target: str = ""
    widths: dict[str, int] = dataclasses.field(default_factory=dict)
    train: tuple[str, ...] = ()
    precision: str = "float32"
    vocabulary: int = 0


# There are few different shapes, since JAX compiles each function once for every shape.
MLP_SHAPES = {"blocks/0": (6, 10), "blocks/1": (10, 4), "tail/gate": (4, 4)}
MLP_TARGET = r"blocks/\d+|tail/gate"
MLP_CASE = ModelCase(
    lambda: MLP(rngs=nnx.Rngs(0)),
    MLP_TARGET,
    MLP_SHAPES,
    (2, 3, 6),
    MLP_TARGET,
    {"blocks/0": 10, "blocks/1": 4, "tail/gate": 4},
    ("head/.*",),
)


def encoder_case(make, blocks, width, inputs, vocabulary=0):
    """Return the `ModelCase` of a transformer encoder of this package.

    The query and value layers get updates, attention and MLP get branches, and the head is trained.
    """
    return ModelCase(
        make,
        TARGETS["qv"],
        {f"blocks/{i}/attention/{name}": (width, width) for i in range(blocks) for name in ("query", "value")},
        inputs,
        r"blocks/\d+/(attention|mlp)",
        {f"blocks/{i}/{name}": width for i in range(blocks) for name in ("attention", "mlp")},
        ("head/.*",),
        vocabulary=vocabulary,
    )


def vit_case(depth):
    config = ViTConfig.from_variant("digits", num_classes=10, depth=depth, width=12, heads=3, mlp_width=20)
    return encoder_case(lambda: ViT(config, rngs=nnx.Rngs(0)), depth, 12, (2, 8, 8, 1))


def bert_case():
    sizes = {"width": 12, "depth": 1, "heads": 3, "mlp_width": 20, "vocab_size": 30, "max_positions": 8}
    config = BertConfig.from_variant("tiny", num_classes=3, **sizes)
    return encoder_case(lambda: Bert(config, rngs=nnx.Rngs(0)), 1, 12, (2, 5), vocabulary=30)


MODELS = {
    "mlp": MLP_CASE,
    "bfloat16_compute": dataclasses.replace(
        MLP_CASE, make=lambda: MLP(dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), precision="bfloat16"
    ),
    "bfloat16_kernels": dataclasses.replace(
        MLP_CASE,
        make=lambda: MLP(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
        precision="bfloat16",
    ),
    "attention": ModelCase(
        lambda: nnx.MultiHeadAttention(2, 6, 10, out_features=4, decode=False, rngs=nnx.Rngs(0)),
        "query|value|out",
        {"query": (6, 10), "value": (6, 10), "out": (10, 4)},
        (2, 3, 6),
        "",
        {"": 4},
    ),
    "own_call": ModelCase(lambda: Gated(6, 4, rngs=nnx.Rngs(0)), "", {"": (6, 4)}, (2, 3, 6), "", {"": 4}),
    # The first axis of the kernel belongs to axis 1 of the input, although `axis` begins with -1.
    "axes": ModelCase(
        lambda: nnx.LinearGeneral((2, 5), (2, 2), axis=(-1, 1), rngs=nnx.Rngs(0)), "", {"": (10, 4)}, (2, 2, 3, 5)
    ),
    "vit": vit_case(1),
    "deep": vit_case(2),
    "bert": bert_case(),
}


def materialize(make: Callable[[], nnx.Module]) -> nnx.Module:
    """Return a model with random parameters from NumPy, the same in every process."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(0)
    flat = [
        (path, v.replace(jnp.asarray(0.4 * rng.normal(size=v.shape), v.dtype))) for path, v in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


@functools.cache
def base(name: str) -> nnx.Module:
    """Return the base model of a case. All tests share it, so that they must not change it."""
    return materialize(MODELS[name].make)


@functools.cache
def inputs(name: str) -> jax.Array:
    """Return the input of a case: token ids, or real numbers in the dtype in which the model computes."""
    case, rng = MODELS[name], np.random.default_rng(1)
    if case.vocabulary:
        return jnp.asarray(rng.integers(1, case.vocabulary, case.inputs), jnp.int32)
    return jnp.asarray(rng.normal(size=case.inputs), case.precision)


def by_path(state: nnx.State) -> dict[str, nnx.Variable]:
    """Return the variables of a state by path, with the keys of a path joined by `/`."""
    return {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


# Optimising a program takes half of its compile time. Tests run each program too few times to gain from that.
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_TO_COMPILE)
def _run(graphdef, state, x, key):
    with adapter_dropout(key):
        return nnx.merge(graphdef, state)(x)


def run(model: nnx.Module, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Return the model's output, from a program that is compiled once for all models with the same structure.

    The dropout of the adapters is on if `key` is not `None`.
    """
    graphdef, state = nnx.split(model)
    return _run(graphdef, state, x, key)


def parameters(model: nnx.Module) -> dict[str, np.ndarray]:
    """Return all parameters of a model by path, including those of adapters."""
    return {path: np.asarray(v[...]) for path, v in by_path(nnx.state(model, nnx.Param)).items()}


def adapter_arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    """Return all trained and constant arrays of adapters by path, without scales."""
    state = nnx.state(model, nnx.Any(AdapterParam, AdapterConstant))
    return {path: np.asarray(v[...]) for path, v in by_path(state).items()}


def trainable_paths(model: nnx.Module, adapter) -> set[str]:
    """Return the paths of the variables that an adapter trains."""
    return set(by_path(nnx.state(model, adapter.trainable)))


def part_arrays(model: nnx.Module, path: str, slot: str, name: str = "default") -> dict[str, np.ndarray]:
    """Return the arrays of one part of an adapter in float64, by name."""
    prefix = f"{path}/{slot}/{name}/".removeprefix("/")
    found = {where: array for where, array in adapter_arrays(model).items() if where.startswith(prefix)}
    return {where.removeprefix(prefix): array.astype(np.float64) for where, array in found.items()}


def perturb(model: nnx.Module, adapter, seed: int = 2, size: float = 0.3) -> nnx.Module:
    """Return the model with noise added to all variables that the adapter trains, as if after training."""
    graphdef, trainable, frozen = nnx.split(model, adapter.trainable, ...)
    rng = np.random.default_rng(seed)
    noise = lambda a: jnp.asarray(np.asarray(a) + size * rng.normal(size=a.shape), a.dtype)  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(noise, trainable), frozen)


def same_bits(left: jax.Array, right: jax.Array) -> bool:
    """Return whether two arrays are equal in shape, dtype and every bit."""
    left, right = np.asarray(left), np.asarray(right)
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()


def relative_error(actual: jax.Array, expected: jax.Array) -> float:
    """Return `|actual - expected| / |expected|` in the Euclidean norm."""
    actual, expected = np.asarray(actual).astype(np.float64), np.asarray(expected).astype(np.float64)
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
