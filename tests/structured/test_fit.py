"""Compare the matrices that `refine` finds with best approximations by formulas, and test invalid arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from surm_jax.errors import UserError
from surm_jax.structured import Circulant, CirculantPair, LowDisplacementRank, LowRank, StructuredMatrix, refine, static
from surm_jax.structured.base import matrix_pytree
from tests.speeds import fast

SHAPE = (20, 12)


def target(dtype="float32", shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def start(dtype="float32") -> LowRank:
    up, down = (np.random.default_rng(1).normal(size=(n, 3)).astype(dtype) for n in SHAPE[::-1])
    return LowRank(down=jnp.asarray(down), up=jnp.asarray(up.T))


def relative_error(matrix, target) -> float:
    target = np.asarray(target, np.float64)
    return np.linalg.norm(np.asarray(matrix.to_dense(), np.float64) - target) / np.linalg.norm(target)


def best_error(target) -> float:
    """Return the relative error of the best approximation of rank 3, by an SVD.

    `refine` keeps the rank of its start, which is 3, so it cannot reach a smaller error.
    """
    singular = np.linalg.svd(np.asarray(target, np.float64), compute_uv=False)
    return np.linalg.norm(singular[3:]) / np.linalg.norm(singular)


def test_reaches_the_truncated_svd():
    found = refine(start(), target())
    assert type(found) is LowRank and found.shape == SHAPE
    assert abs(relative_error(found, target()) - best_error(target())) < 1e-6


@pytest.mark.exhaustive
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", fast(["float32", "float64"], "float64"))
def test_precision_is_that_of_the_arrays_where_doubles_exist(dtype):
    found = refine(start(dtype), target(dtype))
    assert found.down.dtype == found.up.dtype == dtype
    assert abs(relative_error(found, target()) - best_error(target())) < {"float32": 1e-6, "float64": 1e-8}[dtype]


@pytest.mark.exhaustive
@pytest.mark.usefixtures("x64")
def test_finds_a_member_of_its_family_again():
    rng = np.random.default_rng(0)
    member, first = (LowDisplacementRank(*jnp.asarray(rng.normal(size=(2, 12, 2))), shape=(12, 12)) for _ in range(2))
    assert relative_error(first, member.to_dense()) > 0.5
    assert relative_error(refine(first, member.to_dense(), steps=400), member.to_dense()) < 1e-8


def test_composites():
    rng = np.random.default_rng(0)
    C = Circulant(jnp.asarray(rng.normal(size=12).astype(np.float32)), shape=(12, 12))
    L = LowRank(*(jnp.asarray(rng.normal(size=size).astype(np.float32)) for size in ((12, 2), (2, 12))))
    goal = (C @ L + C).to_dense()
    first = 0.5 * C @ L + C
    found = refine(first, goal, steps=100)
    assert jax.tree.structure(found) == jax.tree.structure(first)
    assert relative_error(found, goal) < 0.01 < relative_error(first, goal)


def test_half_precision_is_refined_in_single():
    found = refine(start(jnp.bfloat16), jnp.asarray(target(), jnp.bfloat16), steps=25)
    assert found.down.dtype == found.up.dtype == jnp.float32


def test_more_steps_are_nearer_and_none_is_the_start():
    errors = [relative_error(refine(start(), target(), steps=steps), target()) for steps in (0, 1, 3, 10, 30)]
    assert errors[0] == relative_error(start(), target())
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == 5


@pytest.mark.exhaustive
def test_never_worse_than_the_start():
    best = CirculantPair.nearest(jnp.asarray(target()))
    found = refine(best, target(), steps=30)
    assert relative_error(found, target()) <= relative_error(best, target()) * (1 + 1e-6)


@pytest.mark.exhaustive
def test_under_jit_and_vmap():
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), start())
    goals = jnp.stack([target(), target()[::-1]])
    found = jax.jit(jax.vmap(lambda m, goal: refine(m, goal, progress=True)))(stack, goals)
    for i in range(2):
        matrix = jax.tree.map(lambda leaf, i=i: leaf[i], found)
        assert abs(relative_error(matrix, goals[i]) - best_error(target())) < 1e-6


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_targets_of_any_scale(scale):
    first = LowRank(down=start().down * np.sqrt(scale), up=start().up * np.sqrt(scale))
    assert abs(relative_error(refine(first, scale * target()), scale * target()) - best_error(target())) < 1e-3


def test_a_target_of_zeros():
    found = refine(start(), np.zeros(SHAPE, np.float32))
    assert np.linalg.norm(found.to_dense()) < 1e-3 * np.linalg.norm(start().to_dense())


def test_a_start_that_cannot_learn_stays():
    found = refine(LowRank(down=jnp.zeros((20, 3)), up=jnp.zeros((3, 12))), target())
    assert not np.any(found.down) and not np.any(found.up)


def test_the_bar_shows_steps_and_relative_error(capsys):
    found = refine(start(), target(), steps=30, progress=True)
    shown = capsys.readouterr().err
    assert "refining LowRank: 100%" in shown and "30/30" in shown
    assert f"relative_error={relative_error(found, target()):.3g}" in shown
    refine(start(), target(), steps=30)
    assert capsys.readouterr().err == ""


TRACES = []


@matrix_pytree
class Row(StructuredMatrix):
    """A matrix whose columns all equal `c ** 2`. Each time JAX traces its dense form, `TRACES` gets one more item."""

    c: jax.Array
    shape: tuple[int, int] = static()

    @property
    def T(self):
        raise NotImplementedError

    def _apply(self, x):
        raise NotImplementedError

    def _dense(self):
        TRACES.append(self.shape)
        return jnp.broadcast_to(self.c[:, None] ** 2, self.shape)


def test_compiles_once_for_any_number_of_steps():
    goal = np.abs(target())
    refine(Row(jnp.ones(20), SHAPE), goal, steps=60)
    traced = len(TRACES)
    found = refine(Row(2 * jnp.ones(20), SHAPE), 2 * goal, steps=210)
    assert 0 < traced == len(TRACES)
    np.testing.assert_allclose(found.c**2, 2 * goal.mean(axis=1), rtol=1e-3)


@pytest.mark.parametrize(
    "wrong", [np.ones((12, 20), np.float32), np.ones(20, np.float32), np.ones(SHAPE, np.int32)], ids=str
)
def test_targets_of_another_shape_or_type(wrong):
    with pytest.raises(UserError, match=r"target of a LowRank must be a floating-point matrix of its shape \(20, 12\)"):
        refine(start(), wrong)


@pytest.mark.parametrize("steps", [-1, 2.0, None])
def test_impossible_steps(steps):
    with pytest.raises(UserError, match="steps must be an integer of at least 0"):
        refine(start(), target(), steps=steps)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite(value):
    goal = target()
    goal[3, 3] = value
    with pytest.raises(UserError, match="refine: the target holds numbers that are not finite"):
        refine(start(), goal)
    with pytest.raises(UserError, match=r"refine: a leaf of LowRank\(.*\) holds numbers that are not finite"):
        refine(LowRank(down=start().down.at[0, 0].set(value), up=start().up), target())
    found = jax.jit(lambda m, goal: refine(m, goal, steps=5))(start(), goal)
    jax.tree.map(np.testing.assert_array_equal, found, start())
