"""Decode image files. This package reads all image files here."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from surm_jax.errors import UserError

CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode of a decoded image, by its number of channels."""
_WIDE = ("I", "F")


def decode(content: bytes, channels: int) -> UInt8[np.ndarray, "height width channels"]:
    """Decode the bytes of an image file with Pillow.

    - A photograph is turned upright, as its EXIF orientation says.
    - An image with opacity (an alpha channel, or a transparent colour) is laid on white, unless `channels` is 4. This
      is what the image processors of transformers do.
    - Pixels of 16 bits are reduced to their upper byte. If none reaches 4096, the file is refused: 12-bit pixels, for
      example, would become almost black.
    - Colours become grey, or grey becomes colours, to get the number of `channels`.
    - Only the first frame of an animation is read.

    Args:
        content: The bytes of a file in any format that Pillow reads, such as JPEG, PNG or TIFF.
        channels: The number of channels of the result: 1 (grey), 3 (RGB) or 4 (RGB and opacity).

    Raises:
        UserError: The bytes cannot be decoded, the pixels are 32-bit integers or floats, which have no known range, or
            they have 16 bits and would all become almost black.
    """
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        if image.mode in _WIDE:
            raise UserError(
                f"has 32-bit pixels (Pillow's mode {image.mode}), which have no known range: scale them to 0..255, and"
                " store them as 8-bit pixels"
            )
        if image.mode.startswith("I;16"):
            image = Image.fromarray(_upper_bytes(np.asarray(image)))
        if channels != 4 and image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.asarray(image.convert(CHANNELS[channels]))
    except UserError:
        raise
    except Exception as error:
        # Pillow's errors have no common base class. They are, for example, a SyntaxError for a broken PNG and a class
        # of its own for a decompression bomb.
        raise UserError(f"cannot be decoded ({error})") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _upper_bytes(pixels: np.ndarray) -> np.ndarray:
    if 0 < pixels.max() < 4096:
        raise UserError(
            f"has 16-bit pixels, of which the largest is {pixels.max()}, so that all would become almost black: scale"
            " them to 0..65535, or store them as 8-bit pixels"
        )
    return (pixels >> 8).astype(np.uint8)
