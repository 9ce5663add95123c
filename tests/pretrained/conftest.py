"""Fixtures that make random checkpoints in the AugReg format."""

import numpy as np
import pytest


def _augreg_arrays(*, image_size, patch_size, channels=3, width, depth, heads, mlp_width, num_classes, **_):
    """Return random arrays of a ViT with these sizes, under the names and in the shapes of an AugReg file."""
    rng = np.random.default_rng(7)

    def normal(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    head_width = width // heads
    tokens = (image_size // patch_size) ** 2 + 1
    # The input of the first block is so small that the epsilon of its LayerNorm has a noticeable effect.
    small = 3e-3
    arrays = {
        "cls": normal(1, 1, width, scale=small),
        "embedding/kernel": normal(patch_size, patch_size, channels, width, scale=small / patch_size),
        "embedding/bias": normal(width, scale=small),
        "Transformer/posembed_input/pos_embedding": normal(1, tokens, width, scale=small),
        "Transformer/encoder_norm/scale": 1 + normal(width, scale=0.2),
        "Transformer/encoder_norm/bias": normal(width, scale=0.2),
        "head/kernel": normal(width, num_classes),
        "head/bias": normal(num_classes),
    }
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}/"
        for name in ("LayerNorm_0", "LayerNorm_2"):
            arrays[f"{block}{name}/scale"] = 1 + normal(width, scale=0.2)
            arrays[f"{block}{name}/bias"] = normal(width, scale=0.2)
        attention = f"{block}MultiHeadDotProductAttention_1/"
        for name in ("query", "key", "value"):
            arrays[f"{attention}{name}/kernel"] = normal(width, heads, head_width, scale=1.5 * width**-0.5)
            arrays[f"{attention}{name}/bias"] = normal(heads, head_width, scale=0.3)
        arrays[f"{attention}out/kernel"] = normal(heads, head_width, width, scale=width**-0.5)
        arrays[f"{attention}out/bias"] = normal(width, scale=0.3)
        arrays[f"{block}MlpBlock_3/Dense_0/kernel"] = normal(width, mlp_width, scale=width**-0.5)
        arrays[f"{block}MlpBlock_3/Dense_0/bias"] = normal(mlp_width, scale=0.3)
        arrays[f"{block}MlpBlock_3/Dense_1/kernel"] = normal(mlp_width, width, scale=mlp_width**-0.5)
        arrays[f"{block}MlpBlock_3/Dense_1/bias"] = normal(width, scale=0.3)
    return arrays


@pytest.fixture(scope="session")
def augreg_arrays():
    return _augreg_arrays


@pytest.fixture(scope="session")
def tiny_geometry():
    """The sizes of a tiny ViT. They are all different, so that a test fails if two axes are exchanged."""
    return {"image_size": 12, "patch_size": 4, "width": 15, "depth": 2, "heads": 3, "mlp_width": 22, "num_classes": 7}
