"""Tests of `approximations`, which compares how well the families approximate a matrix with few parameters."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from surm_jax.errors import UserError
from surm_jax.structured import FAMILIES, approximations
from surm_jax.structured.analysis import approximation


def within(shape, budget):
    """Return the names of the families that have a matrix of this shape with at most so many parameters."""
    return {name for name, family in FAMILIES.items() if family.options_within(shape, budget) is not None}


@pytest.fixture
def only(monkeypatch):
    """A function that leaves only the named families to compare, for tests that look at no other."""
    return lambda *names: monkeypatch.setattr(approximation, "FAMILIES", {name: FAMILIES[name] for name in names})


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.exhaustive
@pytest.mark.parametrize("shape", [(12, 12), (8, 12)], ids=str)
def test_energy_is_that_of_the_matrix_and_the_budget_is_kept(shape):
    target = gaussian(*shape)
    found = approximations(target, budget=48, steps=0)
    energies = [kept.energy for kept in found.values()]
    assert energies == sorted(energies, reverse=True)
    assert found.keys() == within(shape, 48)
    for kept in found.values():
        assert kept.matrix.num_params <= 48 and kept.matrix.shape == shape
        lost = np.sum((target - np.asarray(kept.matrix.to_dense(), np.float64)) ** 2) / np.sum(target**2)
        assert kept.energy == pytest.approx(1 - lost, abs=1e-6)
        assert 0 <= kept.energy <= 1


def test_closed_forms_of_numpy(only):
    only("LowRank", "Kronecker", "Toeplitz", "LowRankKronecker", "BlockCirculant", "Tiled")
    target = gaussian(12, 12)
    found = approximations(target, budget=48, steps=0)
    total = np.sum(target**2)
    singular = np.linalg.svd(target, compute_uv=False) ** 2
    assert found["LowRank"].options == {"rank": 2}
    assert found["LowRank"].energy == pytest.approx(singular[:2].sum() / total, rel=1e-5)
    # The budget allows a sum of two Kronecker products of a 4 x 3 and a 3 x 4 matrix. The best such sum keeps the
    # energy of the two largest singular values of the matrix whose rows are the flattened 3 x 4 blocks of the target.
    assert found["Kronecker"].options == {"terms": 2}
    blocks = target.reshape(4, 3, 3, 4).transpose(0, 2, 1, 3).reshape(12, 12)
    singular = np.linalg.svd(blocks, compute_uv=False) ** 2
    assert found["Kronecker"].energy == pytest.approx(singular[:2].sum() / total, rel=1e-5)
    means = [np.mean(np.diag(target, k)) ** 2 * (12 - abs(k)) for k in range(-11, 12)]
    assert found["Toeplitz"].energy == pytest.approx(sum(means) / total, rel=1e-5)
    # The factor A has 12 parameters, so the budget allows the rank 3 for the 3 x 4 factor B. This is the full rank, so
    # the result is the best single Kronecker product.
    assert found["LowRankKronecker"].options == {"rank": 3}
    assert found["LowRankKronecker"].energy == pytest.approx(singular[:1].sum() / total, rel=1e-5)
    # The target is divided into 4 x 4 blocks of shape 3 x 3. Each circulant block has 3 parameters.
    assert found["BlockCirculant"].options == {"block": 3}
    # The best tile is the mean of the four 6 x 6 tiles of the target.
    assert found["Tiled"].options == {"side": 6}
    tile = target.reshape(2, 6, 2, 6).mean(axis=(0, 2))
    assert found["Tiled"].energy == pytest.approx(4 * np.sum(tile**2) / total, rel=1e-5)


@pytest.mark.parametrize(("shape", "side"), [((3, 20), 13), ((20, 3), 13), ((3, 10), 10), ((12, 12), 6)], ids=str)
def test_the_tile_is_the_largest_that_the_budget_holds(only, shape, side):
    only("Tiled")
    found = approximations(gaussian(*shape), budget=39, steps=0)["Tiled"]
    assert found.options == {"side": side}
    assert found.matrix.num_params == min(side, shape[0]) * min(side, shape[1])


def test_every_target_of_a_family_is_kept_whole(only):
    only("Circulant", "Toeplitz", "LowDisplacementRank")
    c, t = gaussian(9), gaussian(2, 9)
    assert approximations(scipy.linalg.circulant(c), 18, steps=0)["Circulant"].energy == pytest.approx(1, abs=1e-6)
    found = approximations(scipy.linalg.toeplitz(t[0], t[1]), 36, steps=0)
    assert found["Toeplitz"].energy == pytest.approx(1, abs=1e-5)
    assert found["LowDisplacementRank"].options == {"rank": 2}
    assert found["LowDisplacementRank"].energy == pytest.approx(1, abs=1e-5)


def test_families_that_are_too_large_are_left_out():
    found = approximations(gaussian(12, 12), budget=12, steps=0)
    assert {"Circulant", "SymmetricToeplitz"} <= found.keys() == within((12, 12), 12)
    assert all(kept.matrix.num_params <= 12 for kept in found.values())
    assert FAMILIES["ToeplitzPair"].count((12, 12)) > 12 and "ToeplitzPair" not in found


@pytest.mark.parametrize(
    "bad", [np.zeros((3, 3), np.float32), np.full((3, 3), np.nan, np.float32)], ids=["zero", "nan"]
)
def test_targets_without_energy(bad):
    with pytest.raises(UserError, match="must be finite and not zero"):
        approximations(bad, 10)


def test_other_mistakes():
    assert "Tiled" in approximations(gaussian(12, 12), 5)
    for budget in (0, -1):
        with pytest.raises(UserError, match=f"no family has a 12 x 12 matrix with at most {budget} parameters"):
            approximations(gaussian(12, 12), budget)
    with pytest.raises(UserError, match=r"budget must be a whole number of parameters, not 24.0"):
        approximations(gaussian(12, 12), 24.0)
    with pytest.raises(UserError, match=r"approximations: nearest\(\) takes a non-empty floating-point matrix"):
        approximations(jnp.ones(3), 5)
