"""Convert decoded images to the input of a model, which is float32 in [-1, 1], square, and possibly augmented.

The pixels x of a uint8 image are scaled to `x / 127.5 - 1`, the convention of the AugReg checkpoints (arXiv
2106.10270). The pixels of a float image must already be in [-1, 1]. Images are resized with Pillow's bilinear filter
with antialiasing. As in the usual pipelines, uint8 images are resized as uint8, so the result is rounded to whole pixel
values. NaN and infinity are kept, and the training loop stops when it finds them.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Shaped
from PIL import Image

Augment = Literal["crop_flip", "affine", "none"]


def eval_image(
    image: Shaped[np.ndarray, "height width channels"], image_size: int
) -> Float[np.ndarray, "image_size image_size channels"]:
    """Resize an image to `image_size` x `image_size`, and scale it to float32 in [-1, 1].

    The whole image is kept, so its aspect ratio may change, as in VTAB (arXiv 1910.04867). In the example, all pixels
    have the largest value, 255, which becomes 1:

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
    """Augment an image and scale it to float32 in [-1, 1].

    Args:
        image: An image of shape (height, width, channels), uint8 or float in [-1, 1].
        rng: The random generator of this example. There is no other source of randomness.
        image_size: The height and width of the result.
        augment: The name of the augmentation:
            - "crop_flip" resizes the image to 8/7 of `image_size`, rounded up (256 for 224), takes a random crop of
              `image_size` x `image_size`, and mirrors it left to right with probability 1/2.
            - "affine" is for digits and letters on a black background, which must not be mirrored. It resizes the image
              to `image_size` and applies a random affine map around the centre: a rotation by up to 0.3 radians, a
              shear by up to 0.2, factors of 0.85 to 1.2 along each axis, and a shift by up to a tenth of
              `image_size`. All of these are drawn uniformly. Pixels from outside the image are black.
            - "none" does the same as `eval_image`.
    """
    if augment == "none":
        return eval_image(image, image_size)
    if augment == "affine":
        return scale(_resample(resize(image, image_size), image_size, _affine_map(rng, image_size)))
    large = -(-image_size * 8 // 7)
    top, left = rng.integers(0, large - image_size, size=2, endpoint=True)
    image = resize(image, large)[top : top + image_size, left : left + image_size]
    return scale(image[:, ::-1] if rng.integers(2) else image)


def resize(image: Shaped[np.ndarray, "height width channels"], size: int) -> Shaped[np.ndarray, "size size channels"]:
    """Resize an image to `size` x `size` pixels, with a bilinear filter and antialiasing.

    A uint8 image stays uint8, and a float image becomes float32. An image that already has this size is returned
    unchanged.
    """
    if image.shape[:2] == (size, size):
        return image
    return _resample(image, size)


def scale(image: Shaped[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Return an image as float32 in [-1, 1]: `x / 127.5 - 1` for uint8 pixels x, and unchanged values for floats."""
    scaled = image.astype(np.float32)
    if image.dtype == np.uint8:
        scaled /= np.float32(127.5)
        scaled -= np.float32(1)
    return scaled


def normalize(
    image: Float[np.ndarray, "height width channels"], mean: Sequence[float], std: Sequence[float]
) -> Float[np.ndarray, "height width channels"]:
    """Normalise each channel of an image in [-1, 1] with a mean and a standard deviation for pixels in [0, 1].

    The result is `(x - mean) / std`, where x is the image after scaling from [-1, 1] to [0, 1]. In the example, all
    pixels 0 in [-1, 1] are 0.5 in [0, 1]:

    >>> normalize(np.zeros((1, 1, 3), np.float32), (0.5, 0.4, 0.3), (0.5, 0.5, 0.5)).astype(float).round(2).tolist()
    [[[0.0, 0.2, 0.4]]]
    """
    return ((image + np.float32(1)) / np.float32(2) - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def _affine_map(rng: np.random.Generator, size: int) -> tuple[float, ...]:
    """Return random coefficients of Pillow's affine transform, as `train_image` describes it.

    The six coefficients map the position (x, y) of each output pixel to a position in the input.
    """
    angle, shear = rng.uniform(-0.3, 0.3), rng.uniform(-0.2, 0.2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    scale_x, scale_y = rng.uniform(0.85, 1.2, size=2)
    matrix = turn @ np.array([[scale_x, shear], [0.0, scale_y]])
    centre = np.full(2, size / 2)
    offset = centre - matrix @ centre + rng.uniform(-0.1, 0.1, size=2) * size
    return (*matrix[0], offset[0], *matrix[1], offset[1])


def _resample(
    image: Shaped[np.ndarray, "height width channels"], size: int, affine_map: tuple[float, ...] | None = None
) -> Shaped[np.ndarray, "size size channels"]:
    """Resize an image to `size` x `size` pixels or, if `affine_map` is given, apply this map to it.

    Resizing uses Pillow's bilinear filter with antialiasing, and the map uses bilinear interpolation.
    """

    def resampled(plane: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(np.ascontiguousarray(plane))
        if affine_map is None:
            return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))
        black = 0 if plane.dtype == np.uint8 else -1.0
        return np.asarray(
            picture.transform(
                (size, size), Image.Transform.AFFINE, affine_map, Image.Resampling.BILINEAR, fillcolor=black
            )
        )

    if image.dtype == np.uint8 and image.shape[-1] == 3:
        return resampled(image)
    # The channels are resampled one by one, because Pillow has no float mode with several channels and treats a fourth
    # channel as opacity.
    image = image if image.dtype == np.uint8 else image.astype(np.float32)
    return np.stack([resampled(image[..., channel]) for channel in range(image.shape[-1])], axis=-1)
