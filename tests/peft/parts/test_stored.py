import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.peft import AdapterConstant, AdapterParam
from surm_jax.peft.parts.update import StoredMatrix
from surm_jax.structured import CirculantPair, Dense, LowRank, Placed, Sum


def pair():
    return CirculantPair(jnp.array([1.0, 2.0, 3.0]), jnp.array([4.0, 5.0, 6.0]), shape=(3, 2))


def low_rank():
    return LowRank(down=jnp.array([[1.0], [2.0], [3.0]]), up=jnp.ones((1, 2)))


@pytest.mark.parametrize(
    ("matrix", "names"),
    [
        (pair(), ("r1", "r2")),
        (Dense(jnp.ones((3, 2))), ("W",)),
        (Placed(pair(), (3, 4), (0, 2)), ("matrix_r1", "matrix_r2")),
        (Sum((pair(), low_rank())), ("terms_0_r1", "terms_0_r2", "terms_1_down", "terms_1_up")),
    ],
)
def test_arrays_are_parameters_by_the_names_of_the_matrix(matrix, names):
    part = StoredMatrix(matrix)
    assert part.names == names
    assert all(type(getattr(part, name)) is AdapterParam for name in names)
    assert part.stored() == matrix and part.stored().shape == matrix.shape
    # What is not an array is structure: two that differ in it are two programs, two of other numbers are one.
    other = StoredMatrix(jax.tree.map(lambda leaf: leaf + 1, matrix))
    assert nnx.graphdef(part) == nnx.graphdef(other)
    assert nnx.graphdef(part) != nnx.graphdef(StoredMatrix(Placed(matrix, (9, 9), (0, 0))))
    graphdef, state = nnx.split(part)
    np.testing.assert_array_equal(
        jax.jit(lambda state: nnx.merge(graphdef, state).stored().to_dense())(state), matrix.to_dense()
    )


def test_frozen_arrays_are_constants_wherever_in_a_composite():
    part = StoredMatrix(Sum((Placed(low_rank(), (3, 4), (0, 2)), Placed(pair(), (3, 4), (0, 0)))), frozen=("down",))
    kinds = {name: type(getattr(part, name)) for name in part.names}
    assert kinds.pop("terms_0_matrix_down") is AdapterConstant
    assert set(kinds.values()) == {AdapterParam} and len(kinds) == 3


def test_what_changes_is_seen():
    part = StoredMatrix(pair())
    part.r1[...] = jnp.array([0.0, 1.0, 0.0])
    np.testing.assert_array_equal(part.stored().to_dense(), [[0, 5], [0, 0], [5, 0]])


def test_compacting():
    part, dense = StoredMatrix(Sum((pair(), low_rank())), frozen=("down",)), Sum((pair(), low_rank())).to_dense()
    part.compact()
    assert part.names == ("terms_0_c", "terms_1_down", "terms_1_up")
    assert not hasattr(part, "terms_0_r1") and type(part.terms_1_down) is AdapterConstant
    np.testing.assert_array_equal(part.stored().to_dense(), dense)
    structure = nnx.graphdef(part)
    part.compact()
    assert nnx.graphdef(part) == structure
