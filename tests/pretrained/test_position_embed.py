import jax
import ml_dtypes
import numpy as np
import pytest
import scipy.ndimage

from surm_jax.errors import UserError
from surm_jax.pretrained.position_embed import resize_position_embed, resize_position_embed_bicubic


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


BOTH = pytest.mark.parametrize(
    "resize",
    [resize_position_embed, lambda embed, shape: resize_position_embed_bicubic(embed, shape, extra_tokens=1)],
)


@pytest.mark.parametrize(("old", "new"), [(14, 24), (14, 7), (14, 2), (3, 5), (2, 9), (24, 14), (5, 1), (1, 4)])
def test_equals_scipy_zoom(old, new):
    embed = random(1, old * old + 1, 6)
    resized = resize_position_embed(embed, (1, new * new + 1, 6))
    grid = scipy.ndimage.zoom(embed[0, 1:].reshape(old, old, 6), (new / old, new / old, 1), order=1)
    np.testing.assert_allclose(resized[0, 1:], grid.reshape(new * new, 6), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(resized[:, :1], embed[:, :1])
    assert resized.dtype == np.float32


def test_identity():
    embed = random(1, 50, 6)
    np.testing.assert_array_equal(resize_position_embed(embed, embed.shape), embed)


def test_without_class_token_on_both_sides():
    embed = random(1, 9, 2)
    grid = scipy.ndimage.zoom(embed.reshape(3, 3, 2), (2, 2, 1), order=1)
    np.testing.assert_allclose(resize_position_embed(embed, (1, 36, 2))[0], grid.reshape(36, 2), rtol=1e-5, atol=1e-6)


def test_class_token_is_dropped_where_the_model_has_none():
    embed = random(1, 10, 2)
    np.testing.assert_allclose(resize_position_embed(embed, (1, 9, 2)), embed[:, 1:], rtol=1e-6)


def test_class_token_cannot_be_invented():
    with pytest.raises(UserError, match="9 position embeddings hold no class token, but the model's 17 do"):
        resize_position_embed(random(1, 9, 2), (1, 17, 2))


@pytest.mark.parametrize("tokens", [0, 8])
def test_no_grid(tokens):
    with pytest.raises(UserError, match=f"{tokens} position embeddings are not a square grid"):
        resize_position_embed(random(1, tokens, 2), (1, 17, 2))


class TestBicubic:
    @pytest.mark.parametrize(("old", "new"), [(14, 24), (14, 7), (2, 3), (3, 2), (5, 1), (1, 4)])
    @pytest.mark.parametrize("extra_tokens", [0, 2])
    def test_equals_jax(self, old, new, extra_tokens):
        """Compare with `jax.image.resize`, which has the same kernel and is tested against PyTorch."""
        embed = random(1, old * old + extra_tokens, 6)
        resized = resize_position_embed_bicubic(embed, (1, new * new + extra_tokens, 6), extra_tokens=extra_tokens)
        grid = embed[0, extra_tokens:].reshape(old, old, 6)
        expected = jax.image.resize(grid, (new, new, 6), "cubic-pytorch", antialias=False).reshape(new * new, 6)
        np.testing.assert_allclose(resized[0, extra_tokens:], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(resized[:, :extra_tokens], embed[:, :extra_tokens])
        assert resized.dtype == np.float32

    def test_identity(self):
        embed = random(1, 50, 6)
        np.testing.assert_array_equal(resize_position_embed_bicubic(embed, embed.shape, extra_tokens=1), embed)

    def test_a_constant_stays_one_beyond_the_border(self):
        embed = np.full((1, 9, 2), 3.5)
        np.testing.assert_allclose(resize_position_embed_bicubic(embed, (1, 49, 2), extra_tokens=0), 3.5, rtol=1e-14)

    @pytest.mark.parametrize(("old", "new"), [(10, 17), (9, 16)])
    def test_no_grid(self, old, new):
        with pytest.raises(UserError, match=r"10 position .* plus 0 others: does|9 position .* plus 1 others: does"):
            resize_position_embed_bicubic(random(1, old, 2), (1, new, 2), extra_tokens=10 - old)


@BOTH
def test_a_size_that_only_a_damaged_configuration_has(resize):
    with pytest.raises(UserError, match="a grid of 2 x 2 position embeddings would grow to 100000 x 100000"):
        resize(random(1, 5, 6), (1, 10**10 + 1, 6))


@BOTH
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_between_points_of_half_precision_is_more_precision(resize, dtype):
    embed = random(1, 5, 6).astype(dtype)
    resized = resize(embed, (1, 17, 6))
    assert resized.dtype == np.float32
    np.testing.assert_array_equal(resized, resize(embed.astype(np.float32), (1, 17, 6)))


@BOTH
@pytest.mark.parametrize("shape", [(2, 5, 6), (0, 5, 6), (5, 6)])
def test_other_dimensions_are_left_to_who_compares_shapes(resize, shape):
    assert resize(random(*shape), (1, 17, 6)).shape == shape
