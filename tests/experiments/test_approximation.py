"""Compare the approximation study on small matrices with numpy and scipy."""

import csv

import numpy as np
import pytest
import scipy.linalg

from experiments import approximation
from experiments.approximation import Kind
from surm_jax.errors import UserError

SIDE = 12


@pytest.fixture(autouse=True)
def small(monkeypatch):
    _shrink(monkeypatch)


def _shrink(monkeypatch):
    monkeypatch.setattr(approximation, "SIDE", SIDE)
    monkeypatch.setattr(approximation, "SIZES", (1, 3))
    # Skip the L-BFGS search, because compiling it takes most of the time. The search has its own tests.
    monkeypatch.setattr(approximation, "SEARCH_STEPS", 0)


def test_targets_are_what_they_are_called():
    targets = dict(zip(approximation.TARGETS, approximation.draw_targets(1).astype(float), strict=True))
    # The first trial is the same, however many trials there are.
    np.testing.assert_array_equal(targets["gaussian"], approximation.draw_targets(2)[0])
    values = np.linalg.svd(targets["near low rank"], compute_uv=False)
    rank = approximation.LOW_RANK
    assert values[rank - 1] > 1 > values[rank] > 0
    for name in ("sine", "slow sine"):
        # A row of a sine target holds sin(k t) for k = 1, 2, ... and one number t. So it satisfies the recurrence
        # sin((k + 1) t) + sin((k - 1) t) = 2 cos(t) sin(k t), in which 2 cos(t) is the second entry over the first.
        M = targets[name]
        doubled = M[:, 1] / M[:, 0]
        np.testing.assert_allclose(M[:, 2:] + M[:, :-2], doubled[:, None] * M[:, 1:-1], atol=1e-4)
    noise = targets["sine with noise"] - np.clip(targets["sine with noise"], -1, 1)
    assert 0 < np.abs(noise).max() < 0.25


def test_equal_budgets():
    assert [(kind.title, kind.parameters) for kind in approximation.kinds()[:6]] == [
        ("circulant", 12),
        ("symmetric Toeplitz", 12),
        ("Toeplitz", 23),
        ("W(G, H), rank 1", 24),
        ("low rank, rank 1", 24),
        ("Kronecker, terms 1", 24),
    ]


def _span(M, basis):
    columns = np.stack([matrix.ravel() for matrix in basis], axis=1)
    weights, *_ = np.linalg.lstsq(columns, M.ravel(), rcond=None)
    return np.linalg.norm(M.ravel() - columns @ weights)


def _tail(M, rank):
    return np.linalg.norm(np.linalg.svd(M, compute_uv=False)[rank:])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Run a study of two trials, two kinds of targets and size 3, and return its folder, its rows and its targets."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        _shrink(patch)
        patch.setattr(approximation, "SIZES", (3,))
        patch.setattr(approximation, "TARGETS", {name: approximation.TARGETS[name] for name in ("gaussian", "sine")})
        approximation.main(["--trials=2", "--steps=1500", f"--out={folder}"])
        targets = approximation.draw_targets(2).astype(float)
    return folder, list(csv.DictReader((folder / "approximation.csv").open())), targets


@pytest.mark.exhaustive
def test_closed_forms_are_optimal_and_descent_comes_near(study):
    _, rows, targets = study
    units, wide = np.eye(SIDE), np.eye(2 * SIDE - 1)
    oracles = {
        "Circulant": lambda M: _span(M, [scipy.linalg.circulant(u) for u in units]),
        "SymmetricToeplitz": lambda M: _span(M, [scipy.linalg.toeplitz(u) for u in units]),
        "Toeplitz": lambda M: _span(M, [scipy.linalg.toeplitz(u[SIDE - 1 :: -1], u[SIDE - 1 :]) for u in wide]),
        "LowRank": lambda M: _tail(M, 3),
        # The factors are 4 x 3 and 3 x 4. If each 3 x 4 block of M becomes a row of a new matrix, a sum of k Kronecker
        # products becomes a matrix of rank k.
        "Kronecker": lambda M: _tail(
            np.stack([M[i : i + 3, j : j + 4].ravel() for i in range(0, 12, 3) for j in range(0, 12, 4)]), 3
        ),
    }
    for family, oracle in oracles.items():
        mine = [row for row in rows if row["family"] == family]
        expected = [oracle(M) / np.linalg.norm(M) for M in targets]
        np.testing.assert_allclose([float(row["nearest"]) for row in mine], expected, atol=2e-5)
        descent = np.array([float(row["descent"]) for row in mine])
        assert np.all(descent > np.array(expected) - 2e-5)
        np.testing.assert_allclose(descent, expected, atol=0.01)


def _skew_circulant(h):
    return scipy.linalg.toeplitz(h, np.concatenate([h[:1], -h[:0:-1]]))


def test_bound_on_low_displacement_rank():
    rng = np.random.default_rng(0)
    G, H = rng.normal(size=(2, 2, SIDE))
    E = rng.normal(size=(SIDE, SIDE))
    W = sum(scipy.linalg.circulant(g) @ _skew_circulant(h) for g, h in zip(G, H, strict=True))
    # For a target that is itself a `W(G, H)` of this rank, the bound is zero.
    exact = approximation.displacement_bound(W.T[None], 2)
    np.testing.assert_allclose(exact, 0, atol=1e-12)
    assert approximation.displacement_bound(W.T[None], 1)[0] > 0.01
    # The distance of M from W is the norm of 0.1 E, so the bound must not exceed it.
    M = W + 0.1 * E
    bound = approximation.displacement_bound(M.T[None], 2)[0]
    assert 0 < bound <= 0.1 * np.linalg.norm(E) / np.linalg.norm(M)


@pytest.mark.exhaustive
def test_study_writes_what_it_found(study):
    folder, rows, _ = study
    assert len(rows) == 6 * 2 * 2
    for row in rows:
        assert float(row["nearest"]) <= float(row["descent"]) + 1e-4
        assert (row["family"] == "LowDisplacementRank") == bool(row["bound"])
        assert float(row["bound"] or 0) <= float(row["nearest"])
    curves = list(csv.DictReader((folder / "approximation.curves.csv").open()))
    last = [float(row["mean"]) for row in curves if (row["target"], row["step"]) == ("gaussian", "1500")]
    finals = [float(row["descent"]) for row in rows if row["target"] == "gaussian"]
    np.testing.assert_allclose(last, np.reshape(finals, (6, 2)).mean(axis=1), atol=2e-5)
    tables = approximation.tables(folder)
    assert [table.count("| W(G, H), rank 3 |") for table in tables.values()] == [1, 1, 1]
    assert (folder / "approximation.png").stat().st_size > 30_000


def test_table_marks_the_nearest_of_a_budget():
    kinds = [Kind("Circulant"), *(Kind(family, 1) for family in ("LowDisplacementRank", "LowRank", "Kronecker"))]
    errors = dict(zip(kinds, (0.9, 0.5, 0.4, 0.6), strict=True))
    lines = approximation.error_table({"gaussian": {kind: [e, e] for kind, e in errors.items()}}).splitlines()[2:]
    # No other family has as few parameters as the circulant, so its error is in bold. Among the other three families
    # low rank has the smallest error.
    assert ["**" in line for line in lines] == [True, False, True, False]


def test_a_deviation_needs_two_trials(tmp_path):
    with pytest.raises(UserError, match="--trials must be at least 2 and --steps 1, got 1 and 5"):
        approximation.main(["--trials=1", "--steps=5", f"--out={tmp_path}"])
    assert not [*tmp_path.iterdir()]
