"""Time three ways to serve adapters: many in one batch, many in a loop, and a single one.

    python -m benchmarks.bank [--out=FILE.json] [--adapters=1,8,64] [--method=circulant] [--variant=S/16] [--batch=64]
                              [--image_size=64] [--rounds=5]

The model is a ViT with random weights. Each adapter has updates of Q, K and V, and a head. Only the forward pass is
timed, in three ways:

- `bank`: one program holds all adapters, and each example of the batch uses one of them (`surm_jax.load_bank`).
- `loop`: a Python loop over the adapters, which runs the examples of each adapter through a model with this single
  adapter. The program is compiled once for all adapters.
- `one`: the whole batch runs through a model with a single adapter.

`bank_to_one` is the time of `bank` over that of `one`, and `loop_to_bank` the time of `loop` over that of `bank`.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from benchmarks.timing import benchmark, device, medians, numbers, setting, table, write
from surm_jax.errors import UserError
from surm_jax.models import TARGETS, ViT, ViTConfig
from surm_jax.peft import (
    METHODS,
    Rule,
    Update,
    adapt,
    adapter_of_examples,
    load_adapter,
    load_bank,
    make_method,
    save_adapter,
)

UPDATES = sorted(name for name, method in METHODS.items() if issubclass(method, Update))
ADAPTERS = flags.DEFINE_list("adapters", ["1", "8", "64"], "Numbers of adapters; each must divide the batch.")
METHOD = flags.DEFINE_enum("method", "circulant", UPDATES, "The update on Q, K and V.")
VARIANT = flags.DEFINE_string("variant", "S/16", "The ViT.")
BATCH = flags.DEFINE_integer("batch", 64, "Images.", lower_bound=1)
IMAGE_SIZE = flags.DEFINE_integer("image_size", 64, "Side of the images in pixels.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds in which each program is timed.", lower_bound=1)
CLASSES = 10
COLUMNS = {
    "adapters": "",
    "one_ms": ".1f",
    "bank_ms": ".1f",
    "loop_ms": ".1f",
    "bank_to_one": ".3f",
    "loop_to_bank": ".2f",
}


def noisy_adapters(base: ViT, count: int, folder: Path) -> list[Path]:
    """Write adapters with random parameters, and return their folders.

    Args:
        base: The frozen base model.
        count: The number of adapters.
        folder: The folder in which each adapter gets its own folder.
    """
    method, folders = make_method(METHOD.value, {}), []
    for number in range(count):
        model, adapter = adapt(base, [Rule(TARGETS["qkv"], method)], train=["head/.*"], rngs=nnx.Rngs(number))
        graphdef, trained, frozen = nnx.split(model, adapter.trainable, ...)
        rng = np.random.default_rng(number)
        trained = jax.tree.map(lambda a, rng=rng: a + jnp.asarray(0.02 * rng.normal(size=a.shape), a.dtype), trained)
        folders.append(folder / str(number))
        save_adapter(folders[-1], nnx.merge(graphdef, trained, frozen), adapter)
    return folders


def programs(base: ViT, folders: list[Path], images: jax.Array) -> dict[str, Callable[[], jax.Array]]:
    """Return the programs `one`, `bank` and `loop` as functions without arguments, after checking that they agree.

    Args:
        base: The frozen base model.
        folders: The folders of the adapters.
        images: The batch of images. Each adapter serves an equal part of it.

    Raises:
        AssertionError: The outputs of `bank` and `loop` differ.
    """
    count = len(folders)
    ids = jnp.arange(len(images)) // (len(images) // count)
    graphdef, bank = nnx.split(load_bank(folders, base))

    @jax.jit
    def banked(state: nnx.State, images: jax.Array, ids: jax.Array) -> jax.Array:
        with adapter_of_examples(ids):
            return nnx.merge(graphdef, state)(images)

    loaded = [nnx.split(load_adapter(folder, base)[0]) for folder in folders]
    single = jax.jit(lambda state, images: nnx.merge(loaded[0][0], state)(images))
    pieces = jnp.split(images, count)

    def loop() -> list[jax.Array]:
        return [single(state, piece) for (_, state), piece in zip(loaded, pieces, strict=True)]

    served, looped = banked(bank, images, ids), jnp.concatenate(loop())
    error = float(jnp.abs(served - looped).max() / jnp.abs(looped).max())
    if not error < 1e-4:
        raise AssertionError(f"bank and loop differ by {error:.2g}")
    return {
        "one": lambda: single(loaded[0][1], images),
        "bank": lambda: banked(bank, images, ids),
        "loop": loop,
    }


def main() -> None:
    """Time all programs, print a table of the results, and write them as rows to the file of `--out`."""
    counts = numbers(ADAPTERS)
    for count in counts:
        if BATCH.value % count:
            raise UserError(f"--adapters={count} does not divide --batch={BATCH.value}")
    config = ViTConfig.from_variant(VARIANT.value, num_classes=CLASSES, image_size=IMAGE_SIZE.value)
    base = ViT(config, rngs=nnx.Rngs(0))
    shape = (BATCH.value, config.image_size, config.image_size, config.channels)
    images = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    rows = []
    for count in counts:
        print(f"{count} adapters", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            times = medians(programs(base, noisy_adapters(base, count, Path(folder)), images), ROUNDS.value)
        rows.append(
            {
                "adapters": count,
                "method": METHOD.value,
                "model": f"ViT-{VARIANT.value}",
                "image_size": config.image_size,
                "batch": BATCH.value,
                **setting(),
                **{f"{name}_ms": 1e3 * seconds for name, seconds in times.items()},
                "bank_to_one": times["bank"] / times["one"],
                "loop_to_bank": times["loop"] / times["bank"],
            }
        )
    print(f"ViT-{VARIANT.value}, {METHOD.value}, batch {BATCH.value}, on {device()}, jax {jax.__version__}")
    print(table(rows, COLUMNS))
    write(rows)


if __name__ == "__main__":
    benchmark(main)
