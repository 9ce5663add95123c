"""How an image becomes the input of a model: resized, cropped, rescaled and normalised.

`surm_jax.pretrained` reads a `Preparation` from the files of a model, and `surm_jax.data` applies it to images.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped
from PIL import Image

from surm_jax.errors import UserError

Image3 = Shaped[np.ndarray, "height width channels"]
PerChannel = float | tuple[float, ...]


class Normalization(NamedTuple):
    """The mean and the standard deviation with which pixels x in [0, 1] are normalised to `(x - mean) / std`.

    Each is a tuple with one number per channel, or one number for all channels.
    """

    mean: PerChannel
    std: PerChannel


_HALF = Normalization(0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """The steps that turn an image into the input of a model, in the order of the attributes.

    The result equals that of the image processors of transformers with Pillow as backend. An image is uint8, or float
    with pixels in [-1, 1]. A float image is treated as if its pixels were numbers from 0 to 255 without rounding.

    Attributes:
        rgb: Whether grey images get three equal channels, and images with opacity are laid on white.
        size: How images are resized. The keys are `height` and `width`; or `shortest_edge`, with or without
            `longest_edge` as a limit; or `max_height` and `max_width`. The last two keep the aspect ratio. `None` means
            that images are not resized. An empty mapping means the height and width that the model reads.
        resample: The number of Pillow's filter, a value of `PIL.Image.Resampling`.
        crop_size: The height and width of the crop from the centre, or `None` for no crop. Smaller images are padded
            with black.
        normalization: The mean and the standard deviation for pixels that are rescaled to [0, 1]. The default scales
            pixels to [-1, 1].
        image_size: The height and width that the model reads, which `fitted` sets.
    """

    rgb: bool = False
    size: Mapping[str, int] | None = field(default_factory=dict)
    resample: int = Image.Resampling.BILINEAR
    crop_size: tuple[int, int] | None = None
    normalization: Normalization = _HALF
    image_size: int | None = None

    @property
    def output(self) -> tuple[int, int] | None:
        """The height and width of prepared images, or `None` if the settings do not determine them.

        If images are only resized with their aspect ratio kept, these are the height and width for square images.

        >>> Preparation(size={"shortest_edge": 256}, crop_size=(224, 224)).output
        (224, 224)
        """
        if self.crop_size or not self.size:
            return self.crop_size
        size = self.size
        edge = min(size.get("shortest_edge", math.inf), size.get("longest_edge", math.inf))
        if edge < math.inf:
            return int(edge), int(edge)
        return (size["height"], size["width"]) if "height" in size else (size["max_height"], size["max_width"])

    def channels(self, stored: int) -> int:
        """Return the number of channels that images with `stored` channels have after preparation."""
        return 3 if self.rgb and stored in (1, 4) else stored

    def fitted(self, image_size: int) -> "Preparation":
        """Return the preparation for a model that reads square images of `image_size` pixels.

        If the settings are for another size, all sizes are multiplied by the same factor:

        >>> Preparation(size={"shortest_edge": 256}, crop_size=(224, 224)).fitted(56).size
        {'shortest_edge': 64}
        """
        size, crop = self.size, self.crop_size
        if self.output is None:
            size = None if size is None else {"height": image_size, "width": image_size}
        elif self.output != (image_size, image_size):
            factor = image_size / self.output[0]
            size = size and {key: max(1, round(value * factor)) for key, value in size.items()}
            crop = crop and (image_size, image_size)
        return dataclasses.replace(self, size=size, crop_size=crop, image_size=image_size)

    def enlarged(self, image_size: int) -> "Preparation":
        """Return this preparation with a larger output, which resizes in any case. It must be fitted (`fitted`)."""
        square = {"height": image_size, "width": image_size}
        fixed = self.size is None and self.crop_size is None
        return (dataclasses.replace(self, size=square) if fixed else self).fitted(image_size)

    def pixels(self, image: Image3) -> Shaped[np.ndarray, "image_size image_size prepared_channels"]:
        """Convert the channels of an image, resize it and crop it. A uint8 image stays uint8.

        Raises:
            UserError: The result has not the height and width that the model reads. This can happen if `size` is `None`
                or keeps the aspect ratio, and there is no crop.
        """
        if self.rgb:
            image = _to_rgb(image)
        before: tuple[int, int] = image.shape[:2]
        if self.size is not None:
            image = resample(image, _resized_shape(before, self.size), self.resample)
        if self.crop_size is not None:
            image = _center_crop(image, *self.crop_size)
        if image.shape[:2] != (self.image_size, self.image_size):
            raise UserError(
                f"an image of {before[0]} x {before[1]} pixels becomes {image.shape[0]} x {image.shape[1]} with the"
                f" settings of the model's image processor (size: {self.size and dict(self.size)}, crop_size:"
                f" {self.crop_size}), but the model reads {self.image_size} x {self.image_size}: give the processor a"
                " crop_size, or a size with height and width"
            )
        return image

    def normalize(self, pixels: Shaped[np.ndarray, "*shape channels"]) -> Float[np.ndarray, "*shape channels"]:
        """Rescale and normalise the pixels of an image. The result is float32.

        In the example, white is 1 after rescaling to [0, 1]:

        >>> preparation = Preparation(normalization=Normalization((0.5, 0.4, 0.3), 0.5))
        >>> preparation.normalize(np.full((1, 1, 3), 255, np.uint8)).round(2).tolist()
        [[[1.0, 1.2000000476837158, 1.399999976158142]]]
        """
        mean, std = (np.asarray(values, np.float32) for values in self.normalization)
        # Pixels x in [0, 1] are 2 x - 1 in [-1, 1].
        return (scale(pixels) - (2 * mean - 1)) / (2 * std)


def scale(image: Shaped[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Return an image as float32 in [-1, 1]: `x / 127.5 - 1` for uint8 pixels x, and unchanged values for floats."""
    scaled = image.astype(np.float32)
    if image.dtype == np.uint8:
        scaled /= np.float32(127.5)
        scaled -= np.float32(1)
    return scaled


def resample(
    image: Image3,
    shape: tuple[int, int],
    resampling: int,
    affine_map: tuple[float, ...] | None = None,
) -> Image3:
    """Resize an image to `shape`, (height, width), or apply an affine map to it if one is given.

    Pillow computes the result. A uint8 image stays uint8, and a float image becomes float32 within [-1, 1], because
    some filters overshoot.
    """
    if affine_map is None and image.shape[:2] == shape:
        return image

    def resampled(plane: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(np.ascontiguousarray(plane))
        if affine_map is None:
            return np.asarray(picture.resize(shape[::-1], Image.Resampling(resampling)))
        black = 0 if plane.dtype == np.uint8 else -1.0
        return np.asarray(
            picture.transform(
                shape[::-1], Image.Transform.AFFINE, affine_map, Image.Resampling(resampling), fillcolor=black
            )
        )

    if image.dtype == np.uint8 and image.shape[-1] == 3:
        return resampled(image)
    # The channels are resampled one by one, because Pillow has no float mode with several channels and treats a fourth
    # channel as opacity.
    image = image if image.dtype == np.uint8 else image.astype(np.float32)
    stacked = np.stack([resampled(image[..., channel]) for channel in range(image.shape[-1])], axis=-1)
    return stacked if image.dtype == np.uint8 else stacked.clip(-1, 1)


def _to_rgb(image: Image3) -> Image3:
    """Repeat the channel of a grey image, and lay an image with opacity on white."""
    if image.shape[-1] == 1:
        return np.repeat(image, 3, axis=-1)
    if image.shape[-1] != 4:
        return image
    opacity = (scale(image[..., 3:]) + 1) / 2
    blended = opacity * scale(image[..., :3]) + (1 - opacity)
    return np.rint((blended + 1) * 127.5).astype(np.uint8) if image.dtype == np.uint8 else blended


def _resized_shape(before: tuple[int, int], size: Mapping[str, int]) -> tuple[int, int]:
    """Return the height and width of a resized image. They are rounded as in transformers."""
    if "height" in size:
        return size["height"], size["width"]
    height, width = before
    if "max_height" in size:
        factor = min(size["max_height"] / height, size["max_width"] / width)
        shape = int(height * factor), int(width * factor)
    else:
        shape = _by_edges(height, width, size["shortest_edge"], size.get("longest_edge"))
    if 0 in shape:
        raise UserError(f"an image of {height} x {width} pixels cannot be resized to {shape[0]} x {shape[1]}")
    return shape


def _by_edges(height: int, width: int, shortest: int, longest: int | None) -> tuple[int, int]:
    short, long = sorted((height, width))
    exact: float = shortest
    if longest is not None and long / short * shortest > longest:
        exact = longest * short / long
        shortest = round(exact)
    if longest is not None and short == shortest:
        return height, width
    # The longer side is computed from the shorter one before it is rounded.
    longer = int(exact * long / short)
    return (shortest, longer) if height <= width else (longer, shortest)


def _center_crop(image: Image3, height: int, width: int) -> Image3:
    """Crop an image from its centre, after padding it with black if it is smaller."""
    missing = [max(0, wanted - has) for wanted, has in zip((height, width), image.shape, strict=False)]
    if any(missing):
        black = 0 if image.dtype == np.uint8 else -1
        image = np.pad(image, [(-(-m // 2), m // 2) for m in missing] + [(0, 0)], constant_values=black)
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]
