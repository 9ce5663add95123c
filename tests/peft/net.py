"""A small model, and its output computed by NumPy, for tests with several adapters on one base model."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from surm_jax.peft import Adapter, Rule, Update, adapt
from tests.peft.models import materialize, parameters, perturb

BODY = r"body/\d"


class Net(nnx.Module):
    """A model of two layers in an `nnx.List`, a norm and a head. Its input has the shape (batch, tokens, 6)."""

    def __init__(self, dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.body = nnx.List([nnx.Linear(6, 8, **options), nnx.Linear(8, 6, **options)])
        self.norm = nnx.LayerNorm(6, dtype=jnp.float32, rngs=rngs)
        self.head = nnx.Linear(6, 3, **options)

    def __call__(self, x):
        for layer in self.body:
            x = jnp.tanh(layer(x))
        return self.head(self.norm(x))


@functools.cache
def net(dtype: str = "float32") -> Net:
    """Return the base model. All tests share it, so that they must not change it."""
    return materialize(lambda: Net(jnp.dtype(dtype), nnx.Rngs(0)))


def batch(size: int = 4, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(5).normal(size=(size, 2, 6)), dtype)


def expected(
    model: nnx.Module,
    x: jax.Array,
    changes: Mapping[str, np.ndarray] | None = None,
    branches: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
) -> np.ndarray:
    """Return the output of a `Net`, computed by numpy in float64.

    Args:
        model: The model, whose adapters are ignored.
        x: The input.
        changes: Dense matrices to add to the kernels, by the path of the layer.
        branches: Functions of a layer's output, by the path of the layer. Their results are added to the output.
    """
    p = {path: array.astype(np.float64) for path, array in parameters(model).items()}
    changes, branches = changes or {}, branches or {}

    def layer(path, x):
        y = x @ (p[f"{path}/kernel"] + changes.get(path, 0)) + p[f"{path}/bias"]
        return y + branches[path](y) if path in branches else y

    x = np.asarray(x).astype(np.float64)
    for path in ("body/0", "body/1"):
        x = np.tanh(layer(path, x))
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return layer("head", x * p["norm/scale"] + p["norm/bias"])


def tuned(
    model: nnx.Module, method: Update, *, target: str = BODY, seed: int = 1, name: str = "default", **options
) -> tuple[nnx.Module, Adapter]:
    """Return the model with one more adapter, and the adapter, with noise added to what it trains."""
    train = options.pop("train", ())
    model, adapter = adapt(model, [Rule(target, method, **options)], train=train, name=name, rngs=nnx.Rngs(seed))
    return perturb(model, adapter, seed, size=0.5), adapter
