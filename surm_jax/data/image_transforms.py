"""From a decoded image to what a model reads: float32 in [-1, 1], one size, with or without augmentation.

A uint8 image becomes `x / 127.5 - 1`, the convention of the AugReg checkpoints (arXiv 2106.10270). A float image is
taken as already in [-1, 1]. Resizing is Pillow's bilinear filter with antialiasing, on uint8 as in the usual pipelines,
so the result is rounded to whole pixel values there. Non-finite pixels are passed on, never repaired: the training loop
stops at them.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Shaped
from PIL import Image

Augment = Literal["crop_flip", "shift", "none"]


def eval_image(
    image: Shaped[np.ndarray, "height width channels"], image_size: int
) -> Float[np.ndarray, "image_size image_size channels"]:
    """Resizes to `image_size` x `image_size`, if the size differs, and scales to float32 in [-1, 1].

    The aspect ratio is not kept and nothing is cut off, as in VTAB (arXiv 1910.04867).

    >>> eval_image(np.full((8, 8, 1), 255, np.uint8), 4)[0, 0]
    array([1.], dtype=float32)
    """
    return scale(resize(image, image_size))


def train_image(
    image: Shaped[np.ndarray, "height width channels"],
    rng: np.random.Generator,
    *,
    image_size: int,
    augment: Augment,
) -> Float[np.ndarray, "image_size image_size channels"]:
    """Augments an image and scales it to float32 in [-1, 1].

    Args:
        image: (height, width, channels), uint8 or float in [-1, 1].
        rng: The example's own generator, the only source of randomness.
        image_size: Height and width of the result.
        augment: "crop_flip" resizes to 8/7 of `image_size`, rounded up (256 for 224), cuts `image_size` x `image_size`
            at random and mirrors left to right with probability 1/2. "shift" moves the image by up to an eighth of
            `image_size` in each direction and repeats its border: for digits and letters, whose size and handedness
            mean something. "none" does what `eval_image` does.
    """
    if augment == "none":
        return eval_image(image, image_size)
    if augment == "shift":
        border = image_size // 8
        image = np.pad(resize(image, image_size), ((border, border), (border, border), (0, 0)), mode="edge")
    else:
        image = resize(image, -(-image_size * 8 // 7))
    top, left = rng.integers(0, image.shape[0] - image_size, size=2, endpoint=True)
    image = image[top : top + image_size, left : left + image_size]
    if augment == "crop_flip" and rng.integers(2):
        image = image[:, ::-1]
    return scale(image)


def resize(image: Shaped[np.ndarray, "height width channels"], size: int) -> Shaped[np.ndarray, "size size channels"]:
    """Resizes to `size` x `size` (bilinear, antialiased), keeping uint8 as uint8 and floats as float32.

    An image that has the size already is returned as it is.
    """
    if image.shape[:2] == (size, size):
        return image
    if image.dtype == np.uint8 and image.shape[-1] == 3:
        return np.asarray(_resample(image, size))
    # Channel by channel: Pillow has no multi-channel float mode, and would take a fourth channel for opacity.
    image = image if image.dtype == np.uint8 else image.astype(np.float32)
    return np.stack([np.asarray(_resample(image[..., c], size)) for c in range(image.shape[-1])], axis=-1)


def scale(image: Shaped[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Returns float32 in [-1, 1]: `x / 127.5 - 1` for uint8, unchanged values for floats."""
    scaled = image.astype(np.float32)
    if image.dtype == np.uint8:
        scaled /= np.float32(127.5)
        scaled -= np.float32(1)
    return scaled


def _resample(image: np.ndarray, size: int) -> Any:
    return Image.fromarray(np.ascontiguousarray(image)).resize((size, size), Image.Resampling.BILINEAR)
