"""Measure the memory of a training step over a base in float32, in bfloat16 and quantised by qwix.

    python -m benchmarks.quantised [--width=1024] [--depth=4] [--tokens=64] [--out=FILE.json]

The model is a stack of MLPs with residuals. LoRA of rank 4 is trained in all of its kernels. `base_mb` is what XLA
holds for the frozen arguments, and `temp_mb` what it holds within the step. Needs qwix (`requirements-peers.txt`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

import surm_jax
from benchmarks.timing import benchmark, device, setting, table, write

WIDTH = flags.DEFINE_integer("width", 1024, "Features of the model.", lower_bound=1)
DEPTH = flags.DEFINE_integer("depth", 4, "Blocks of the model.", lower_bound=1)
TOKENS = flags.DEFINE_integer("tokens", 64, "Tokens in a batch.", lower_bound=1)
COLUMNS = {"base": "", "base_mb": ".2f", "temp_mb": ".2f", "trained_mb": ".2f"}


class Model(nnx.Module):
    """A stack of MLPs with residuals."""

    def __init__(self, dtype: Any, rngs: nnx.Rngs):
        width, options = WIDTH.value, {"param_dtype": dtype, "dtype": dtype, "use_bias": False, "rngs": rngs}
        self.ups = nnx.List([nnx.Linear(width, 4 * width, **options) for _ in range(DEPTH.value)])
        self.downs = nnx.List([nnx.Linear(4 * width, width, **options) for _ in range(DEPTH.value)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the output for vectors of shape (tokens, width)."""
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(jax.nn.gelu(up(x)))
        return x


def base_model(base: str, x: jax.Array) -> nnx.Module:
    """Return the model with a base in `float32` or `bfloat16`, or quantised to `int8` or `nf4`."""
    if base in ("float32", "bfloat16"):
        return Model(jnp.dtype(base), nnx.Rngs(0))
    import qwix

    rule = qwix.QuantizationRule(module_path=".*", weight_qtype=base, tile_size=64 if base == "nf4" else None)
    return qwix.quantize_model(Model(jnp.bfloat16, nnx.Rngs(0)), qwix.PtqProvider([rule]), x)


def row(base: str) -> dict[str, Any]:
    """Compile a step with one kind of base, and return a row with its memory."""
    x = jnp.ones((TOKENS.value, WIDTH.value), "float32" if base == "float32" else "bfloat16")
    rules = [surm_jax.Rule(".*/.*", surm_jax.LoRA(rank=4))]
    model, adapter = surm_jax.adapt(base_model(base, x), rules, rngs=nnx.Rngs(1))
    graphdef, trained, frozen = nnx.split(model, adapter.trainable, ...)  # type: ignore[misc]

    def loss(trained: nnx.State, frozen: nnx.State, x: jax.Array) -> jax.Array:
        return jnp.mean(nnx.merge(graphdef, trained, frozen, copy=True)(x).astype(jnp.float32) ** 2)

    memory = jax.jit(jax.grad(loss)).lower(trained, frozen, x).compile().memory_analysis()
    numbers = sum(leaf.size for leaf in jax.tree.leaves(trained))
    held = memory.argument_size_in_bytes - 4 * numbers - x.nbytes
    sizes = {"base_mb": held, "temp_mb": memory.temp_size_in_bytes, "trained_mb": 4 * numbers}
    flags_ = {"width": WIDTH.value, "depth": DEPTH.value, "tokens": TOKENS.value}
    return {"base": base, **{name: size / 1e6 for name, size in sizes.items()}, **flags_, **setting()}


def main() -> None:
    """Print a table of the memory with each kind of base, and write its rows to the file of `--out`."""
    rows = [row(base) for base in ("float32", "bfloat16", "int8", "nf4")]
    print(f"{DEPTH.value} MLPs of width {WIDTH.value}, {TOKENS.value} tokens, on {device()}, jax {jax.__version__}")
    print(table(rows, COLUMNS))
    write(rows)


if __name__ == "__main__":
    benchmark(main)
