"""Compare resizing, scaling and augmentation with other functions of Pillow and with NumPy."""

import numpy as np
import pytest
from PIL import Image

from surm_jax.data import eval_image, train_image
from surm_jax.preparation import scale


def random_image(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def augmented(image, size, augment, count):
    return [train_image(image, np.random.default_rng(seed), image_size=size, augment=augment) for seed in range(count)]


def bilinear_matrix(old: int, new: int) -> np.ndarray:
    """Return the bilinear (triangle) filter with antialiasing as a (new, old) matrix, computed from its definition."""
    ratio = old / new
    width = max(ratio, 1.0)
    centres = (np.arange(new) + 0.5) * ratio
    weights = np.maximum(0, 1 - np.abs(np.arange(old) + 0.5 - centres[:, None]) / width)
    return weights / weights.sum(axis=1, keepdims=True)


def test_same_size_is_only_scaled():
    image = random_image(6, 6, 3)
    scaled = eval_image(image, 6)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, image / 127.5 - 1, atol=1e-7)


def test_scaling_meets_both_ends():
    np.testing.assert_array_equal(eval_image(np.array([[[0], [255]], [[255], [0]]], np.uint8), 2)[0, :, 0], [-1, 1])


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("shape", "size"), [((20, 31), 8), ((8, 8), 13), ((5, 9), 9)])
def test_resizing_is_the_antialiased_triangle_filter(shape, size, channels):
    image = random_image(*shape, channels)
    exact = np.einsum("yh,hwc,xw->yxc", bilinear_matrix(shape[0], size), image, bilinear_matrix(shape[1], size))
    # Pillow rounds to whole pixel values after each of the two passes.
    np.testing.assert_allclose((eval_image(image, size) + 1) * 127.5, exact, atol=1.1)
    floats = (image / 127.5 - 1).astype(np.float32)
    np.testing.assert_allclose(eval_image(floats, size), exact / 127.5 - 1, atol=1e-5)


def test_resizing_rgb_is_pillows():
    image = random_image(40, 30, 3)
    expected = np.asarray(Image.fromarray(image).resize((16, 16), resample=Image.BILINEAR), np.float64) / 127.5 - 1
    np.testing.assert_allclose(eval_image(image, 16), expected, atol=1e-6)


def test_float_images_are_taken_as_scaled():
    image = np.linspace(-1, 1, 16).reshape(4, 4, 1)
    out = eval_image(image, 4)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, image.astype(np.float32))


def test_floats_that_may_be_scaled_to_0_1_are_told():
    with pytest.warns(UserWarning, match=r"no negative pixel, but .* scaled to \[-1, 1\].*2 \* image - 1"):
        eval_image(np.full((4, 4, 1), 0.25), 4)


def test_inputs_are_left_alone():
    image = np.linspace(-1, 1, 48, dtype=np.float32).reshape(4, 4, 3)
    before = image.copy()
    eval_image(image, 4)[:] = 7
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(("size", "large"), [(32, 37), (8, 10), (7, 8), (1, 2)])
def test_crops_are_windows_of_the_enlarged_image(size, large):
    image = random_image(size, size, 3)
    big = eval_image(image, large)
    windows = {
        big[y : y + size, x : x + size].tobytes() for y in range(large - size + 1) for x in range(large - size + 1)
    }
    mirrored = {np.frombuffer(w, np.float32).reshape(size, size, 3)[:, ::-1].tobytes() for w in windows}
    for crop in augmented(image, size, "crop_flip", 10):
        assert crop.tobytes() in windows | mirrored


def recovered_map(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Measure the random affine map of the augmentation "affine" for a seed. Return its matrix and its shift.

    It is measured on an image whose first two channels hold the coordinates of its pixels.
    """
    x, y = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
    image = np.stack([x, y, np.ones_like(x)], axis=-1).astype(np.float32) / size
    out = train_image(image, np.random.default_rng(seed), image_size=size, augment="affine") * size
    # The channels are linear in the coordinates, so interpolation is exact, except near pixels from outside the image.
    inside = np.all([np.roll(out[..., 2], move, axis) > 1 - 1e-3 for axis in (0, 1) for move in (-1, 0, 1)], axis=0)
    inside[[0, -1]] = inside[:, [0, -1]] = False
    design = np.stack([x[inside] - size / 2, y[inside] - size / 2, np.ones(inside.sum())], axis=1)
    fit, residual, *_ = np.linalg.lstsq(design, out[inside][:, :2], rcond=None)
    assert inside.sum() > size**2 / 3
    assert residual.max() < 1e-4
    return fit[:2].T, fit[2] - size / 2


def test_affine_draws_keep_their_bounds_and_fill_them():
    size, drawn = 32, []
    for seed in range(200):
        matrix, shift = recovered_map(size, seed)
        angle, scale_x = np.arctan2(matrix[1, 0], matrix[0, 0]), np.hypot(*matrix[:, 0])
        unturned = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) @ matrix[:, 1]
        drawn.append([angle, unturned[0], scale_x, unturned[1], *(shift / size)])
    bounds = np.array([[-0.3, 0.3], [-0.2, 0.2], [0.85, 1.2], [0.85, 1.2], [-0.1, 0.1], [-0.1, 0.1]])
    least, most = np.min(drawn, axis=0), np.max(drawn, axis=0)
    width = bounds[:, 1] - bounds[:, 0]
    assert (least >= bounds[:, 0] - 1e-3).all() and (most <= bounds[:, 1] + 1e-3).all()
    assert (least < bounds[:, 0] + 0.1 * width).all() and (most > bounds[:, 1] - 0.1 * width).all()


@pytest.mark.parametrize("seed", range(3))
def test_affine_fills_with_black_whatever_the_numbers_of_an_image(seed):
    black = np.zeros((8, 8, 1), np.uint8)
    for image in (black, scale(black)):
        out = train_image(image, np.random.default_rng(seed), image_size=8, augment="affine")
        np.testing.assert_array_equal(out, -1)


def test_every_window_and_both_directions_are_drawn_evenly():
    drawn = [crop.tobytes() for crop in augmented(random_image(8, 8, 1), 8, "crop_flip", 1800)]
    counts = [drawn.count(kind) for kind in set(drawn)]
    assert len(counts) == 18
    # The tolerance is five standard deviations of a binomial count.
    np.testing.assert_allclose(counts, 100, atol=50)


def test_no_augmentation_is_evaluation():
    image = random_image(9, 12, 3)
    np.testing.assert_array_equal(augmented(image, 6, "none", 1)[0], eval_image(image, 6))


@pytest.mark.parametrize("augment", ["crop_flip", "affine", "none"])
@pytest.mark.parametrize("channels", [1, 3])
def test_augmented_images_stay_in_range(augment, channels):
    image = random_image(10, 14, channels) // 255 * 255  # Only 0 and 255, so that an overshoot is noticed.
    for out in augmented(image, 8, augment, 5):
        assert out.dtype == np.float32
        assert out.shape == (8, 8, channels)
        assert out.min() >= -1
        assert out.max() <= 1
