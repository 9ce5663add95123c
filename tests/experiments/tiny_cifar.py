"""Files for tests of the experiments on images: a prepared CIFAR-10 of random images, and the weights of a tiny ViT."""

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from flax import nnx

from surm_jax.models import ViT, ViTConfig
from surm_jax.pretrained import load, save_model
from tests.data.prepared import write_set
from tests.data.test_tfds_sets import png

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
GEOMETRY = {"image_size": 32, "patch_size": 16, "width": 12, "depth": 1, "heads": 3, "mlp_width": 24}


def write_data(folder: Path) -> Path:
    """Write a data set `cifar10` with 80 training and 20 test images, equally many of each class.

    Args:
        folder: The folder for data sets of TensorFlow Datasets, which is also returned.
    """
    rng = np.random.default_rng(0)
    splits = {
        split: [{"image": png(rng.integers(0, 256, (32, 32, 3), np.uint8)), "label": i % 10} for i in range(count)]
        for split, count in (("train", 80), ("test", 20))
    }
    features = {
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(names=list(CLASSES)),
    }
    write_set(folder, "cifar10", "1.0.0", features, splits)
    return folder


def write_model(path: Path) -> None:
    """Write the random weights of a ViT with five classes to a file."""
    config = ViTConfig(**GEOMETRY, num_classes=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(path, load(None, lambda: ViT(config, rngs=nnx.Rngs(5))))
