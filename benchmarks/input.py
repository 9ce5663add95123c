"""Measure how long a training step of ViT-B/16 waits for its batch, with real images from the input pipeline.

    python -m benchmarks.input --data=FOLDER [--out=FILE.json] [--set=cifar10] [--variant=B/16] [--batch=8] [--steps=20]

The model trains circulant updates of Q, K and V. The images are cropped, resized and flipped (`crop_flip`). As in a
training run, the next batch is prepared while the device computes the current step. The first two steps are not timed.

- `ms` is the time of a step, `wait_ms` the time that it waits for its batch, and `share_waiting` their ratio.
- `one_batch_ms` is the time of a step without the pipeline, in a loop that uses the same batch again and again, and
  `ratio_to_one_batch` is `ms` over `one_batch_ms`. It shows how much the pipeline slows the model down, as it does if
  both run on the same processors.
- `images_per_s` is the rate of the pipeline while no model is running, and `images_needed_per_s` the rate at which the
  step without the pipeline consumes images.
"""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
from absl import flags
from flax import nnx
from tqdm import tqdm

from benchmarks.timing import benchmark, device, setting, table, write
from surm_jax import data
from surm_jax.devices.mesh import make_mesh, put_batch
from surm_jax.errors import UserError
from surm_jax.models import TARGETS, ViT, ViTConfig
from surm_jax.peft import CirculantUpdate, Rule, adapt
from surm_jax.tasks import ImageClassification
from surm_jax.tasks.objective import CLASSES
from surm_jax.training.partition import partition
from surm_jax.training.step import init_state, make_train_step

DATA = flags.DEFINE_string("data", None, "The folder of prepared TFDS sets.")
SET = flags.DEFINE_string("set", "cifar10", "The images.")
VARIANT = flags.DEFINE_string("variant", "B/16", "The ViT.")
BATCH = flags.DEFINE_integer("batch", 8, "Images per step.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 20, "Steps that are timed.", lower_bound=1)
WARM_UP = 2
COLUMNS = {
    "ms": ".1f",
    "wait_ms": ".2f",
    "share_waiting": ".2%",
    "one_batch_ms": ".1f",
    "ratio_to_one_batch": ".3f",
    "images_per_s": ",.0f",
    "images_needed_per_s": ",.1f",
}


class Model:
    """A model in training.

    A call with a batch starts a training step, and returns when the previous step has ended.
    """

    def __init__(self, classes: int, channels: int, image_size: int | None):
        geometry = {} if image_size is None else {"image_size": image_size}
        config = ViTConfig.from_variant(VARIANT.value, num_classes=classes, channels=channels, **geometry)
        rules = [Rule(TARGETS["qkv"], CirculantUpdate())]
        model = ViT(config, rngs=nnx.Rngs(0))
        model, adapter = adapt(model, rules, train=["head/.*"], rngs=nnx.Rngs(1))
        self.image_size, self.mesh = config.image_size, jax.sharding.get_mesh()
        parts, trained, self.frozen = partition(model, adapter)
        optimizer = optax.adamw(1e-4)
        self.state, self.key = init_state(trained, optimizer, self.mesh), jax.random.key(0)
        self.step = make_train_step(parts, ImageClassification.forward, CLASSES, optimizer, self.mesh)
        self.before: dict[str, jax.Array] | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> None:
        """Start a step with this batch, and wait for the previous step."""
        self.state, metrics = self.step(self.state, self.frozen, put_batch(batch, self.mesh), self.key, {})
        jax.device_get(self.before)
        self.before = metrics


def timed(model: Model, batches: Iterator[dict[str, np.ndarray]], what: str) -> tuple[float, float]:
    """Return the mean time of a training step and the mean time that a step waits for its batch, in milliseconds.

    Args:
        model: The model to train.
        batches: The batches.
        what: The name of the progress bar.
    """
    waits, ends = [], []
    for _ in tqdm(range(WARM_UP + STEPS.value), desc=what, leave=False):
        began = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - began)
        model(batch)
        ends.append(time.perf_counter())
    return 1e3 * (ends[-1] - ends[WARM_UP - 1]) / STEPS.value, 1e3 * statistics.mean(waits[WARM_UP:])


def pipeline_rate(batches: Iterator[dict[str, np.ndarray]]) -> float:
    """Return how many images per second the input pipeline delivers while no model is running."""
    # Skip the batches that the pipeline has prepared in advance, before the clock starts.
    for _ in range(WARM_UP + 8):
        next(batches)
    began = time.perf_counter()
    for _ in range(STEPS.value):
        next(batches)
    return BATCH.value * STEPS.value / (time.perf_counter() - began)


def repeated(batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Yield the same batch forever."""
    while True:
        yield batch


def main() -> None:
    """Time the steps and the pipeline, print a table of the results, and write them as a row to the file of `--out`."""
    images = data.load(SET.value, DATA.value)
    if not isinstance(images, data.ImageDataset):
        raise UserError(f"--set={SET.value} has no images")
    with jax.set_mesh(make_mesh(1, {})):
        small = images.image_shape[0] if SET.value.startswith("digits") else None
        model = Model(len(images.classes), images.channels, small)

        def batches() -> data.TrainBatches:
            options = {"batch_size": BATCH.value, "image_size": model.image_size, "augment": "crop_flip"}
            return data.train_batches(images.train, **options, seed=0)

        images_per_s = pipeline_rate(batches())
        ms, wait_ms = timed(model, batches(), "real data")
        one_batch_ms, _ = timed(model, repeated(next(batches())), "one batch")
    row: dict[str, Any] = {
        "model": f"ViT-{VARIANT.value}",
        "set": SET.value,
        "image_size": model.image_size,
        "batch": BATCH.value,
        "steps": STEPS.value,
        **setting(),
        "ms": ms,
        "wait_ms": wait_ms,
        "share_waiting": wait_ms / ms,
        "one_batch_ms": one_batch_ms,
        "ratio_to_one_batch": ms / one_batch_ms,
        "images_per_s": images_per_s,
        "images_needed_per_s": 1e3 * BATCH.value / one_batch_ms,
    }
    print(f"{SET.value} at {model.image_size} pixels, ViT-{VARIANT.value}, batch {BATCH.value}, on {device()}")
    print(table([row], COLUMNS))
    write([row])


if __name__ == "__main__":
    benchmark(main)
