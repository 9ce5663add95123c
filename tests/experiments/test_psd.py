"""Tests of the study of positive semi-definite matrices, with few trials, against numpy and scipy."""

import csv

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize

from experiments import psd
from surm_jax.errors import UserError


@pytest.fixture(scope="module")
def targets():
    return np.stack([psd.gram(np.random.default_rng(seed)) for seed in range(2)]).astype(np.float32)


def test_targets_have_unit_rows_and_are_what_they_are_called():
    for width in (2, 50):
        M = psd.gram(np.random.default_rng(0), width)
        np.testing.assert_allclose(np.diag(M), 1)
        assert np.linalg.eigvalsh(M)[0] > -1e-12
        assert np.linalg.matrix_rank(M) == width
    np.testing.assert_allclose(np.linalg.norm(psd.scaled_rows(np.random.default_rng(0)), axis=1), 1)


def test_every_family_has_fifty_numbers():
    assert {np.prod(family.parameters) for family in psd.FAMILIES.values()} == {50}


def _projection_error(M, basis):
    """Return the distance of M from the span of a basis of matrices, relative to the norm of M, by least squares."""
    columns = np.stack([matrix.ravel() for matrix in basis], axis=1)
    weights = np.linalg.solve(columns.T @ columns, columns.T @ M.ravel())
    return np.linalg.norm(M.ravel() - columns @ weights) / np.linalg.norm(M)


@pytest.mark.exhaustive
def test_optima_of_subspaces_are_least_squares(targets):
    errors = psd.optimal_errors(targets)
    units = np.eye(psd.SIDE)
    for trial, M in enumerate(targets.astype(float)):
        circulant = _projection_error(M, [scipy.linalg.circulant(unit) for unit in units])
        toeplitz = _projection_error(M, [scipy.linalg.toeplitz(unit) for unit in units])
        np.testing.assert_allclose(errors["circulant"][trial], circulant, atol=1e-5)
        np.testing.assert_allclose(errors["Toeplitz"][trial], toeplitz, atol=1e-5)
        np.testing.assert_allclose(
            psd.identity_errors(targets)[trial], _projection_error(M, [np.eye(psd.SIDE)]), atol=1e-5
        )


def _rank_one(u, M):
    """Return `||u u^T - M||^2 / 2` for a vector u and a target M, and the gradient by u."""
    R = np.outer(u, u) - M
    return np.sum(R**2) / 2, (R + R.T) @ u


def _kronecker(a, M):
    """Return `||A (x) A^T - M||^2 / 2` for the entries of A and a target M, and the gradient by these entries."""
    A = a.reshape(10, 5)
    R = np.kron(A, A.T) - M
    blocks = R.reshape(10, 5, 5, 10)
    gradient = np.einsum("ipjq,qp->ij", blocks, A) + np.einsum("ipjq,ij->qp", blocks, A)
    return np.sum(R**2) / 2, gradient.ravel()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "make", [psd.gram, pytest.param(psd.scaled_rows, marks=pytest.mark.exhaustive)], ids=list(psd.TARGETS)
)
@pytest.mark.parametrize(("name", "objective"), [("rank one", _rank_one), ("Kronecker", _kronecker)])
def test_no_search_finds_a_better_product(make, name, objective):
    M = make(np.random.default_rng(3))
    error = psd.optimal_errors(M[None].astype(np.float32))[name][0]
    rng = np.random.default_rng(0)
    starts = 0.3 * rng.normal(size=(3, 50))
    found = [scipy.optimize.minimize(objective, start, args=(M,), jac=True, method="L-BFGS-B").fun for start in starts]
    # All local minima are global ones, so every search must end with the error of the closed form.
    np.testing.assert_allclose(np.sqrt(2 * np.array(found)) / np.linalg.norm(M), error, atol=1e-5)


def test_order_counts_trials():
    errors = {"a": np.array([3.0, 3.0, 1.0]), "b": np.array([2.0, 1.0, 2.0]), "c": np.array([1.0, 2.0, 1.0])}
    assert psd.order(errors) == {"a > b": 2, "b > c": 2, "a > b > c": 1}


def test_study_descends_to_the_optimum_and_writes_what_it_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(psd, "WIDTHS", (2, 500))
    psd.main(["--trials=2", "--steps=2000", f"--out={tmp_path}"])
    rows = list(csv.DictReader((tmp_path / "psd.csv").open()))
    assert len(rows) == 2 * 4 * 2 + 2 * 2 + 2 * 4 * 2
    for row in rows:
        if row["descent"]:
            assert float(row["optimum"]) - 1e-5 <= float(row["descent"]) <= float(row["optimum"]) + 2e-3
    text = capsys.readouterr().out
    # The paper's order of the exact errors holds in no trial if X has 2 columns, and in every trial if it has 500.
    whole = [line for line in text.splitlines() if line.startswith(("| 2 |", "| 500 |"))]
    assert [line.split("|")[-2].strip() for line in whole] == ["0 of 2", "2 of 2"]
    fitted = [row for row in rows if row["descent"]]
    by_hand = [
        all(np.diff([float(r["optimum"]) for r in fitted if (r["target"], r["trial"]) == (target, trial)]) < 0)
        for target in psd.TARGETS
        for trial in "01"
    ]
    claims = [line for line in text.splitlines() if line.startswith("| rank one > Kronecker > circulant > Toeplitz")]
    assert [int(line.split("|")[-2]) for line in claims] == [sum(by_hand[:2]), sum(by_hand[2:])]
    assert (tmp_path / "psd.png").stat().st_size > 30_000


def test_a_deviation_needs_two_trials(tmp_path):
    with pytest.raises(UserError, match="--trials must be at least 2 and --steps 1, got 1 and 5"):
        psd.main(["--trials=1", "--steps=5", f"--out={tmp_path}"])
    assert not [*tmp_path.iterdir()]
