"""Resizing, scaling and augmentation, against Pillow called another way and against numpy by hand."""

import numpy as np
import pytest
from PIL import Image

from surm_jax.data import eval_image, train_image


def random_image(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def augmented(image, size, augment, count):
    return [train_image(image, np.random.default_rng(seed), image_size=size, augment=augment) for seed in range(count)]


def bilinear_matrix(old: int, new: int) -> np.ndarray:
    """The antialiased triangle filter as a (new, old) matrix, from its definition."""
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


def test_float_images_are_taken_as_scaled_and_not_repaired():
    image = np.full((4, 4, 1), 0.25, np.float64)
    image[1, 1] = np.nan
    out = eval_image(image, 4)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, image.astype(np.float32))
    assert np.isnan(eval_image(image, 2)).any()


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


@pytest.mark.parametrize(("size", "border"), [(32, 4), (8, 1), (7, 0)])
def test_shifts_are_windows_of_the_image_with_repeated_borders(size, border):
    image = random_image(size, size, 3)
    rows = np.clip(np.arange(-border, size + border), 0, size - 1)
    big = eval_image(image, size)[rows][:, rows]
    windows = {big[y : y + size, x : x + size].tobytes() for y in range(2 * border + 1) for x in range(2 * border + 1)}
    drawn = {shifted.tobytes() for shifted in augmented(image, size, "shift", 30)}
    assert drawn <= windows
    assert len(drawn) > (border > 0) * 5


def test_every_window_and_both_directions_are_drawn_evenly():
    image = random_image(8, 8, 1)
    for augment, kinds in (("shift", 9), ("crop_flip", 18)):
        drawn = [crop.tobytes() for crop in augmented(image, 8, augment, 1800)]
        counts = [drawn.count(kind) for kind in set(drawn)]
        assert len(counts) == kinds
        # Five standard deviations of a binomial count.
        np.testing.assert_allclose(counts, 1800 / kinds, atol=5 * np.sqrt(1800 / kinds))


def test_a_shift_never_mirrors():
    # Never darker to the right in any window; a mirrored one would be brighter to the left.
    image = np.broadcast_to(np.arange(0, 240, 30, dtype=np.uint8)[None, :, None], (8, 8, 1))
    assert all((np.diff(crop, axis=1) >= 0).all() for crop in augmented(image, 8, "shift", 50))
    falling = [(np.diff(crop, axis=1) <= 0).all() for crop in augmented(image, 8, "crop_flip", 50)]
    assert 10 < sum(falling) < 40


def test_no_augmentation_is_evaluation():
    image = random_image(9, 12, 3)
    np.testing.assert_array_equal(augmented(image, 6, "none", 1)[0], eval_image(image, 6))


@pytest.mark.parametrize("augment", ["crop_flip", "shift", "none"])
@pytest.mark.parametrize("channels", [1, 3])
def test_augmented_images_stay_in_range(augment, channels):
    image = random_image(10, 14, channels) // 255 * 255  # Only the extremes, where an overshoot would show.
    for out in augmented(image, 8, augment, 5):
        assert out.dtype == np.float32
        assert out.shape == (8, 8, channels)
        assert out.min() >= -1
        assert out.max() <= 1
