"""Pretrains the small ViT that the package ships, on handwritten digits 0 to 4, from nothing.

    python experiments/pretrain_digits.py

Writes `surm_jax/pretrained/weights/vit_digits.safetensors`, which `configs/digits.py` adapts to the digits 5 to 9.

To tell five digits apart takes little, and what is learned for it carries over badly. So the task is harder: 20 classes, digit times
quarter turn, and every one of the 598 training images comes in 30 versions (rotated, sheared, scaled, moved, brightened). It sees no
digit above 4 and no test image. The training itself is an ordinary run of the library, in `runs/pretrain_digits`; the images are in
`runs/pretrain_digits.npz`.
"""

import sys
from pathlib import Path

import numpy as np
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs import digits
from surm_jax import data
from surm_jax.pretrained.sources import DIGITS_WEIGHTS
from surm_jax.training import parse
from surm_jax.training.modes import merge_run, train_run

WORKDIR = Path("runs/pretrain_digits")
VERSIONS = 30


def distorted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns a version of a grey image (8, 8, 1): an affine map around its centre, and another brightness."""
    angle, shear = rng.uniform(-0.3, 0.3), rng.uniform(-0.2, 0.2)
    scale_y, scale_x = rng.uniform(0.85, 1.2, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[scale_y, shear], [0, scale_x]])
    centre = (np.array(image.shape[:2]) - 1) / 2
    offset = centre - matrix @ centre + rng.uniform(-0.8, 0.8, 2)
    moved = ndimage.affine_transform(image[..., 0].astype(np.float64), matrix, offset, order=1)
    return np.clip(moved * rng.uniform(0.8, 1.15), 0, 255).astype(np.uint8)[..., None]


def quarter_turns(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns all images in four directions; the class is digit + 5 * number of quarter turns."""
    turned = [np.rot90(images, turns, axes=(1, 2)) for turns in range(4)]
    return np.concatenate(turned), np.concatenate([labels + 5 * turns for turns in range(4)])


def make_data(path: Path) -> None:
    """Writes the 20-class data set, the same one every time."""
    digits_0to4, rng = data.load("digits_0to4"), np.random.default_rng(0)
    train, test = digits_0to4.train, digits_0to4.test
    versions = np.stack([distorted(image, rng) for _ in range(VERSIONS) for image in train.images])
    train_images, train_labels = quarter_turns(versions, np.tile(train.labels, VERSIONS))
    test_images, test_labels = quarter_turns(test.images, test.labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path, train_images=train_images, train_labels=train_labels, test_images=test_images, test_labels=test_labels
    )


def main() -> None:
    """Makes the data, trains, and writes the weights."""
    images = WORKDIR.with_suffix(".npz")
    make_data(images)
    config = digits.get_config()
    config.model.checkpoint = "none"
    config.data.name = str(images)
    config.peft.method = "full"
    config.optim.steps = 3000
    config.optim.learning_rate.full = 2e-3
    config.optim.groups.rest.weight_decay = 0.05
    config.log.evaluate_every = 1000
    train_run(parse(config), WORKDIR)
    (path,) = merge_run(WORKDIR)
    path.replace(DIGITS_WEIGHTS)
    print(f"moved to {DIGITS_WEIGHTS} ({DIGITS_WEIGHTS.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
