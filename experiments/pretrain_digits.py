"""Pretrain the small ViT that the package ships, on handwritten digits 0 to 4, from random weights.

    python -m experiments.pretrain_digits

The script writes the trained model to `runs/pretrain_digits/model.safetensors`. With `--replace` it also replaces the
file of weights in the package, `surm_jax/pretrained/weights/vit_digits.safetensors`, which `configs/digits.py` adapts
to the digits 5 to 9. An adapter works only with the exact weights that it was trained on, so adapters for the old file
do not fit the new one.

Telling five digits apart is easy, and features learned for it transfer badly. So the model learns a harder task with
20 classes: every image is shown in four directions (turned by 0, 90, 180 and 270 degrees), and a class is a pair of a
digit and a direction. The model is trained on no digit above 4 and on no test image. The training is an ordinary run of
the library in the folder `runs/pretrain_digits`, with the data set in `runs/pretrain_digits.npz`.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from configs import digits
from experiments.command import command
from surm_jax import data
from surm_jax.atomic import replacing
from surm_jax.pretrained.sources import DIGITS_WEIGHTS
from surm_jax.training import parse
from surm_jax.training.modes import merge_run, train_run

WORKDIR = Path("runs/pretrain_digits")
MODEL = WORKDIR / "model.safetensors"


def quarter_turns(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return all images turned by 0, 1, 2 and 3 quarter turns, with their new labels.

    The new label is the digit plus 5 times the number of quarter turns.
    """
    turned = [np.rot90(images, turns, axes=(1, 2)) for turns in range(4)]
    return np.concatenate(turned), np.concatenate([labels + 5 * turns for turns in range(4)])


def make_data(path: Path) -> None:
    """Write the data set of digits 0 to 4 in four directions, which has 20 classes, to an `.npz` file."""
    source = data.load("digits_0to4")
    train_images, train_labels = quarter_turns(source.train.images, source.train.labels)
    test_images, test_labels = quarter_turns(source.test.images, source.test.labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path, train_images=train_images, train_labels=train_labels, test_images=test_images, test_labels=test_labels
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the data set, train the model, and write its weights."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000, help="training steps (default: %(default)s)")
    parser.add_argument("--replace", action="store_true", help="also replace the shipped weights")
    options = parser.parse_args(arguments)
    images = WORKDIR.with_suffix(".npz")
    make_data(images)
    config = digits.get_config()
    config.model.checkpoint = "none"
    config.data.name = str(images)
    config.peft.method = "full"
    config.optim.steps = options.steps
    config.optim.learning_rate.full = 2e-3
    config.optim.groups.rest.weight_decay = 0.05
    config.log.evaluate_every = 1000
    train_run(parse(config), WORKDIR)
    (path,) = merge_run(WORKDIR, {})
    path.replace(MODEL)
    print(f"moved to {MODEL} ({MODEL.stat().st_size:,} bytes)")
    if options.replace:
        with replacing(DIGITS_WEIGHTS) as new:
            shutil.copyfile(MODEL, new)
        print(f"and copied to {DIGITS_WEIGHTS}")


if __name__ == "__main__":
    command(main)
