"""Pretrains the small ViT that the package ships, on handwritten digits 0 to 4, from nothing.

    python experiments/pretrain_digits.py

Writes `surm_jax/pretrained/weights/vit_digits.safetensors`, which `configs/digits.py` adapts to the digits 5 to 9.

To tell five digits apart takes little, and what is learned for it carries over badly. So the task is harder: 20
classes, digit times quarter turn. It sees no digit above 4 and no test image. The training itself is an ordinary run of
the library, in `runs/pretrain_digits`; the images are in `runs/pretrain_digits.npz`.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs import digits
from surm_jax import data
from surm_jax.pretrained.sources import DIGITS_WEIGHTS
from surm_jax.training import parse
from surm_jax.training.modes import merge_run, train_run

WORKDIR = Path("runs/pretrain_digits")


def quarter_turns(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns all images in four directions; the class is digit + 5 * number of quarter turns."""
    turned = [np.rot90(images, turns, axes=(1, 2)) for turns in range(4)]
    return np.concatenate(turned), np.concatenate([labels + 5 * turns for turns in range(4)])


def make_data(path: Path) -> None:
    """Writes the 20-class data set."""
    source = data.load("digits_0to4")
    train_images, train_labels = quarter_turns(source.train.images, source.train.labels)
    test_images, test_labels = quarter_turns(source.test.images, source.test.labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path, train_images=train_images, train_labels=train_labels, test_images=test_images, test_labels=test_labels
    )


def main(steps: int = 3000) -> None:
    """Makes the data, trains, and writes the weights."""
    images = WORKDIR.with_suffix(".npz")
    make_data(images)
    config = digits.get_config()
    config.model.checkpoint = "none"
    config.data.name = str(images)
    config.peft.method = "full"
    config.optim.steps = steps
    config.optim.learning_rate.full = 2e-3
    config.optim.groups.rest.weight_decay = 0.05
    config.log.evaluate_every = 1000
    train_run(parse(config), WORKDIR)
    (path,) = merge_run(WORKDIR, {})
    path.replace(DIGITS_WEIGHTS)
    print(f"moved to {DIGITS_WEIGHTS} ({DIGITS_WEIGHTS.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
