"""A prepared CIFAR-10 of noise, and a small ViT on 32 x 32 pixels, for the tests of the grids on images."""

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from flax import nnx

from surm_jax.models import ViT, ViTConfig
from surm_jax.pretrained import load, save_model
from tests.data.images.test_tfds_sets import png, write_set

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
GEOMETRY = {"image_size": 32, "patch_size": 16, "width": 12, "depth": 1, "heads": 3, "mlp_width": 24}


def write_data(folder: Path) -> Path:
    """Write `cifar10`: 80 training and 20 test images, equally many of each class."""
    rng = np.random.default_rng(0)
    records = {
        split: [(png(rng.integers(0, 256, (32, 32, 3), np.uint8)), index % 10) for index in range(count)]
        for split, count in (("train", 80), ("test", 20))
    }
    features = {
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(names=list(CLASSES)),
    }
    write_set(folder, "cifar10", records=records, features=features)
    return folder


def write_model(path: Path) -> None:
    """Write a model of random weights."""
    config = ViTConfig(**GEOMETRY, num_classes=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(path, load(lambda: ViT(config, rngs=nnx.Rngs(5)), None))
