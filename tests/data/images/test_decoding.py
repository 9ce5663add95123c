"""Compare `decode` with NumPy, for images in which Pillow's own conversions would lose something."""

import io

import numpy as np
import pytest
from PIL import Image

from surm_jax.data.images.decoding import decode
from surm_jax.errors import UserError

RGB = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
GREY16 = np.array([[0, 100, 300, 20000, 40000, 65535]], np.uint16)


def encoded(image, form="PNG", **options) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_become_their_upper_byte(form, channels):
    got = decode(encoded(GREY16, form), channels)
    np.testing.assert_array_equal(got, np.repeat((GREY16 // 256).astype(np.uint8)[..., None], channels, axis=-1))


@pytest.mark.parametrize("largest", [255, 4095])
def test_16_bits_that_would_all_become_black_are_refused(largest):
    with pytest.raises(UserError, match=f"the largest is {largest}, so that all would become almost black"):
        decode(encoded(np.array([[0, 7, largest]], np.uint16), "PNG"), 3)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_unknown_range_are_refused(dtype):
    with pytest.raises(UserError, match=r"has 32-bit pixels .* no known range: scale them to 0..255"):
        decode(encoded(GREY16.astype(dtype), "TIFF"), 3)


def on_white(rgb, opacity):
    part = opacity[..., None].astype(float) / 255
    return part * rgb + (1 - part) * 255


def test_opacity_is_laid_on_white():
    opacity = np.random.default_rng(1).integers(0, 256, (4, 6), np.uint8)
    content = encoded(np.dstack([RGB, opacity]))
    np.testing.assert_allclose(decode(content, 3), on_white(RGB, opacity), atol=1)
    np.testing.assert_array_equal(decode(content, 4), np.dstack([RGB, opacity]))
    grey = encoded(Image.merge("LA", [Image.fromarray(RGB[..., 0]), Image.fromarray(opacity)]))
    np.testing.assert_allclose(decode(grey, 1), on_white(RGB[..., :1], opacity), atol=1)


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_is_white(form):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    content = encoded(image, form, transparency=1)
    np.testing.assert_array_equal(decode(content, 3), [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]])


# The value of the tag says what has to be done to the stored pixels.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_photographs_are_turned_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode(encoded(RGB, exif=exif), 3), UPRIGHT[orientation](RGB))
    np.testing.assert_array_equal(
        decode(encoded(GREY16, exif=exif), 1)[..., 0], UPRIGHT[orientation]((GREY16 // 256).astype(np.uint8))
    )


@pytest.mark.parametrize("content", [b"", b"no image", encoded(RGB)[:60]])
def test_damage_is_told(content):
    with pytest.raises(UserError, match="cannot be decoded"):
        decode(content, 3)
