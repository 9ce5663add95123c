"""Models, inputs and tolerances that the tests of this folder share."""

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

# The files of an adapter folder.
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

# Relative error of a whole output in the Euclidean norm, by the dtype that the model computes in.
TOLERANCES = {
    "float32": 1e-5,  # rounding is about 1e-7; FFTs, and sums over layers and features, add a factor of some tens
    "bfloat16": 2.0**-6,  # 8 bits: one rounding is 2^-9, and it happens at other places once the update is merged
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
        make: Builds it.
        target: The pattern of the layers that get updates.
        shapes: Their paths and matrices, (in_features, out_features).
        inputs: The shape of its input.
        branch_target: The pattern of the modules that get branches.
        widths: Their paths and the features of their outputs; empty: branches are not for this model.
        train: Patterns of what is trained besides.
        precision: The dtype that it computes in.
        vocabulary: The number of tokens; if it is not 0, the input holds whole numbers below it.
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


# Few sizes in all, since each one is compiled for.
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
    """A transformer of this package: updates of query and value, branches after attention and MLP, and the head."""
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
    # The kernel's first axis belongs to the input's axis 1, although `axis` names the last one first.
    "axes": ModelCase(
        lambda: nnx.LinearGeneral((2, 5), (2, 2), axis=(-1, 1), rngs=nnx.Rngs(0)), "", {"": (10, 4)}, (2, 2, 3, 5)
    ),
    "vit": vit_case(1),
    "deep": vit_case(2),
    "bert": bert_case(),
}


def materialize(make: Callable[[], nnx.Module]) -> nnx.Module:
    """Build a model with NumPy's random numbers, the same in every process, without compiling its initialisers."""
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
    case, rng = MODELS[name], np.random.default_rng(1)
    if case.vocabulary:
        return jnp.asarray(rng.integers(1, case.vocabulary, case.inputs), jnp.int32)
    return jnp.asarray(rng.normal(size=case.inputs), case.precision)


def by_path(state: nnx.State) -> dict[str, nnx.Variable]:
    """The variables of a state by their paths, as the library writes them."""
    return {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


# Half of what compilation costs goes into making programs fast that run once here.
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_TO_COMPILE)
def _run(graphdef, state, x, key):
    with adapter_dropout(key):
        return nnx.merge(graphdef, state)(x)


def run(model: nnx.Module, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """The model's output, compiled once for all models of one structure; with a key its adapters drop."""
    graphdef, state = nnx.split(model)
    return _run(graphdef, state, x, key)


def parameters(model: nnx.Module) -> dict[str, np.ndarray]:
    """All parameters by path, those of adapters included."""
    return {path: np.asarray(v[...]) for path, v in by_path(nnx.state(model, nnx.Param)).items()}


def adapter_arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    """What adapters brought by path, trained or not, without their scales."""
    state = nnx.state(model, nnx.Any(AdapterParam, AdapterConstant))
    return {path: np.asarray(v[...]) for path, v in by_path(state).items()}


def trainable_paths(model: nnx.Module, adapter) -> set[str]:
    """The paths of what an adapter trains."""
    return set(by_path(nnx.state(model, adapter.trainable)))


def part_arrays(model: nnx.Module, path: str, slot: str, name: str = "default") -> dict[str, np.ndarray]:
    """The arrays of one part of an adapter in float64, by their names."""
    prefix = f"{path}/{slot}/{name}/".removeprefix("/")
    found = {where: array for where, array in adapter_arrays(model).items() if where.startswith(prefix)}
    return {where.removeprefix(prefix): array.astype(np.float64) for where, array in found.items()}


def perturb(model: nnx.Module, adapter, seed: int = 2, size: float = 0.3) -> nnx.Module:
    """Return the model with noise on everything that the adapter trains, as if it had been trained."""
    graphdef, trainable, frozen = nnx.split(model, adapter.trainable, ...)
    rng = np.random.default_rng(seed)
    noise = lambda a: jnp.asarray(np.asarray(a) + size * rng.normal(size=a.shape), a.dtype)  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(noise, trainable), frozen)


def same_bits(left: jax.Array, right: jax.Array) -> bool:
    """Return whether two arrays are equal in shape, dtype and every bit."""
    left, right = np.asarray(left), np.asarray(right)
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()


def relative_error(actual: jax.Array, expected: jax.Array) -> float:
    """The relative error in the Euclidean norm."""
    actual, expected = np.asarray(actual).astype(np.float64), np.asarray(expected).astype(np.float64)
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
