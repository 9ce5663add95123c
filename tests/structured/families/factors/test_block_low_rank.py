"""Compare `BlockLowRank` with `numpy.block` and with GraLoRA of the library peft, and `nearest` with SVDs of blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from surm_jax.errors import UserError
from surm_jax.structured import BlockLowRank
from tests.structured.cases import ProjectionContract, assert_close


def blocks_of(down, up):
    return np.block([[d @ u for d, u in zip(*row, strict=True)] for row in zip(down, up, strict=True)])


class TestBlockLowRank(ProjectionContract):
    family = BlockLowRank

    def dense(self, arrays, shape):
        return blocks_of(arrays["down"], arrays["up"])


@pytest.mark.usefixtures("x64")
def test_nearest_leaves_the_smallest_singular_values_of_every_block():
    target = np.random.default_rng(0).normal(size=(12, 18))
    found = BlockLowRank.nearest(target, rank=6, blocks=3)
    left = sum(
        np.sum(np.linalg.svd(block, compute_uv=False)[2:] ** 2)
        for rows in np.split(target, 3)
        for block in np.split(rows, 3, axis=1)
    )
    assert np.sum((target - blocks_of(*map(np.asarray, found.arrays().values()))) ** 2) == pytest.approx(left)


def test_numbers_of_gralora_and_its_rank():
    # A matrix of rank 8 has as many parameters.
    assert BlockLowRank.count((768, 3072), rank=8, blocks=4) == 8 * (768 + 3072)
    matrix = BlockLowRank.random((32, 48), rank=4, blocks=4)
    assert matrix.rank == 4 and np.linalg.matrix_rank(matrix.to_dense()) == 16


def test_equals_gralora_of_peft():
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    config = peft.GraloraConfig(target_modules=["0"], r=4, gralora_k=2, hybrid_r=0, alpha=4, init_weights=False)
    layer = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 10)), config).base_model.model[0]
    # peft's A is (N, in / N, r). Its inner features are ordered by output block. Those of B are ordered by input block.
    A, B = (array["default"].detach().numpy() for array in (layer.gralora_A, layer.gralora_B))
    down, up = A.reshape(2, 3, 2, 2).transpose(0, 2, 1, 3), B.reshape(2, 2, 2, 5).swapaxes(0, 1)
    with torch.no_grad():
        expected = layer.get_delta_weight("default").numpy().T
    assert_close(BlockLowRank(jnp.asarray(down), jnp.asarray(up)).to_dense(), expected, "float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "a 12 x 18 matrix has a rank from 1 to 12, but 0 was asked for"),
        ({"rank": 14}, "a rank from 1 to 12, but 14 was asked for"),
        ({"rank": 3, "blocks": 2}, "the number of blocks must divide 12, 18 and the rank 3, not 2"),
        ({"rank": 4, "blocks": 4}, "must divide 12, 18 and the rank 4, not 4"),
    ],
    ids=str,
)
def test_impossible_sizes(options, message):
    with pytest.raises(UserError, match=message):
        BlockLowRank.init(jax.random.key(0), (12, 18), scale=1.0, **options)
    with pytest.raises(UserError, match=message):
        BlockLowRank.nearest(jnp.ones((12, 18)), **options)
