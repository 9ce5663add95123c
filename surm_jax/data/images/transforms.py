"""Convert decoded images to the input of a model, which is float32, square, and possibly augmented.

By default, the pixels x of a uint8 image are scaled to `x / 127.5 - 1`, the convention of the AugReg checkpoints (arXiv
2106.10270), and images are resized with Pillow's bilinear filter with antialiasing. The pixels of a float image must
already be in [-1, 1]. uint8 images are resized as uint8, so the result is rounded to whole pixel values.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float, Shaped
from PIL import Image

from surm_jax.data.images.checks import check_image
from surm_jax.preparation import Preparation, resample

Augment = Literal["crop_flip", "affine", "none"]
"""The augmentations of training images, which `train_image` explains."""

SQUARE = Preparation()
"""The preparation of models without settings: resize to a square, bilinearly, and scale to [-1, 1]."""


def eval_image(
    image: Shaped[np.ndarray, "height width channels"], image_size: int, preparation: Preparation = SQUARE
) -> Float[np.ndarray, "image_size image_size channels"]:
    """Prepare an image for a model that reads `image_size` x `image_size` pixels.

    Args:
        image: The image, uint8 or float in [-1, 1].
        image_size: The height and width of the result.
        preparation: How the image is prepared, as `surm_jax.pretrained.image_preparation` reads it. With the default
            the whole image is kept, so its aspect ratio may change, as in VTAB (arXiv 1910.04867), and the pixels are
            scaled to [-1, 1].

    Raises:
        UserError: The image has another shape, dtype or range, or does not become square.

    In the example, all pixels have the largest value, 255, which becomes 1:

    >>> eval_image(np.full((8, 8, 1), 255, np.uint8), 4)[0, 0]
    array([1.], dtype=float32)
    """
    check_image(image)
    preparation = preparation.fitted(image_size)
    return preparation.normalize(preparation.pixels(image))


def train_image(
    image: Shaped[np.ndarray, "height width channels"],
    rng: np.random.Generator,
    *,
    image_size: int,
    augment: Augment,
    preparation: Preparation = SQUARE,
) -> Float[np.ndarray, "image_size image_size channels"]:
    """Augment an image and prepare it for a model.

    Args:
        image: An image of shape (height, width, channels), uint8 or float in [-1, 1].
        rng: The random generator of this example. There is no other source of randomness.
        image_size: The height and width of the result.
        augment: The name of the augmentation:
            - "crop_flip" prepares the image for 8/7 of `image_size`, rounded up (256 for 224), takes a random crop of
              `image_size` x `image_size`, and mirrors it left to right with probability 1/2.
            - "affine" is for digits and letters on a black background, which must not be mirrored. It resizes the image
              to `image_size` and applies a random affine map around the centre: a rotation by up to 0.3 radians, a
              shear by up to 0.2, factors of 0.85 to 1.2 along each axis, and a shift by up to a tenth of
              `image_size`. All of these are drawn uniformly. Pixels from outside the image are black.
            - "none" does the same as `eval_image`.
        preparation: How the image is resized, cropped and normalised, as in `eval_image`.

    Raises:
        UserError: See `eval_image`.
    """
    check_image(image)
    if augment == "crop_flip":
        large = -(-image_size * 8 // 7)
        top, left = rng.integers(0, large - image_size, size=2, endpoint=True)
        enlarged = preparation.fitted(image_size).enlarged(large)
        pixels = enlarged.pixels(image)[top : top + image_size, left : left + image_size]
        return preparation.normalize(pixels[:, ::-1] if rng.integers(2) else pixels)
    pixels = preparation.fitted(image_size).pixels(image)
    if augment == "affine":
        shape = (image_size, image_size)
        pixels = resample(pixels, shape, Image.Resampling.BILINEAR, _affine_map(rng, image_size))
    return preparation.normalize(pixels)


def _affine_map(rng: np.random.Generator, size: int) -> tuple[float, ...]:
    """Return random coefficients of Pillow's affine transform, as `train_image` describes it.

    The six coefficients map each output position (x, y) to a position in the input.
    """
    angle, shear = rng.uniform(-0.3, 0.3), rng.uniform(-0.2, 0.2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    scale_x, scale_y = rng.uniform(0.85, 1.2, size=2)
    matrix = turn @ np.array([[scale_x, shear], [0.0, scale_y]])
    centre = np.full(2, size / 2)
    offset = centre - matrix @ centre + rng.uniform(-0.1, 0.1, size=2) * size
    return (*matrix[0], offset[0], *matrix[1], offset[1])
