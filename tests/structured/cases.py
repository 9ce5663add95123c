"""Tests that every structured matrix must pass, as base classes of test classes.

They compare a structured matrix with a dense matrix that a subclass of the base class builds by NumPy or SciPy.

- `MatrixContract` is for any structured matrix.
- `StructuredMatrixContract` is for a family, which also has the methods `init` and `nearest`.
- `ProjectionContract` is for a family whose method `nearest` returns the best approximation.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from surm_jax.errors import UserError
from surm_jax.structured import Family, StructuredMatrix, rows
from tests.speeds import fast

# For each dtype, the largest relative error that `assert_close` accepts. It is measured in the Frobenius norm.
TOLERANCES = {
    "float64": 1e-10,  # Rounding errors are about 1e-16 times log n. The rest is a margin for other FFT libraries.
    "float32": 1e-5,  # Rounding errors are about 1e-7 times log n. Sums over 768 features add a factor of some tens.
    "float16": 2.0**-11,  # The result is rounded once, to 11 bits, with an error of half a unit in the last place.
    "bfloat16": 2.0**-8,  # The result is rounded once, to 8 bits.
}

# Shapes (in_features, out_features) for the tests: odd and even sizes, wide and tall matrices. Tests that compile many
# programs use only the shapes in `SMALL`.
SMALL = [(1, 1), (2, 2), (7, 7), (1, 4), (4, 1), (5, 12), (12, 5)]
SHAPES = [*SMALL, (3, 3), (8, 8), (12, 12), (2, 3), (3, 2), (768, 768), (768, 501)]
BATCHES = [(), (4,), (2, 3), (2, 1, 3)]


dense_of = jax.jit(lambda matrix: matrix.to_dense())


def assert_close(actual, expected, precision: str = "float64") -> None:
    """Check that two arrays have the same shape and that the relative error of `actual` is small.

    Args:
        actual: The result to check.
        expected: The correct result.
        precision: The dtype whose tolerance in `TOLERANCES` applies.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    error, size = np.linalg.norm(actual - expected), np.linalg.norm(expected)
    assert error <= TOLERANCES[precision] * size, f"relative error {error / max(size, 1e-300):.2e} in {precision}"


class MatrixContract:
    """The tests that every structured matrix must pass.

    A subclass sets `family` to the class under test and defines the methods `abstract` and `dense`.
    """

    family: type[StructuredMatrix]

    def abstract(self, shape: tuple[int, int]) -> StructuredMatrix:
        """Return a matrix of the class under test without arrays: its leaves are float32 `jax.ShapeDtypeStruct`s.

        Args:
            shape: `(in_features, out_features)`.
        """
        raise NotImplementedError

    def dense(self, arrays: dict[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
        """Return the dense form of a matrix with the given arrays, as the expected result of the tests.

        A subclass must compute it by NumPy or SciPy, and not by the code under test.

        Args:
            arrays: The arrays of the matrix by name, in float64.
            shape: The shape of the matrix, `(in_features, out_features)`.
        """
        raise NotImplementedError

    def path(self, name: str) -> str:
        """Return the path of the array `name` in the pytree, as `jax.tree_util.keystr` writes it."""
        return f".{name}"

    def field(self, name: str) -> str:
        """Return the name that an array has in its own term or factor, such as `c` for `terms_0_c` in a sum.

        In a matrix that does not consist of other matrices, it is `name` itself.
        """
        return name

    # Helpers

    def create(self, shape, dtype="float64", seed=0) -> tuple[StructuredMatrix, np.ndarray]:
        """Return a matrix with random leaves, and the dense matrix that `dense` computes for it."""
        rng = np.random.default_rng(seed)
        # The random values are drawn by NumPy. JAX would compile a program for every shape, which is slow.
        start = self.abstract(shape)
        leaves = {k: jnp.asarray(rng.normal(size=v.shape).astype(dtype)) for k, v in start.arrays().items()}
        return start.with_arrays(**leaves), self.oracle(leaves, shape)

    def oracle(self, leaves, shape) -> np.ndarray:
        return self.dense({k: np.asarray(v, np.float64) for k, v in leaves.items()}, shape)

    def tangents(self, matrix) -> dict[str, np.ndarray]:
        """Return the derivatives of the dense form by every parameter.

        The dense form is an affine function of each single parameter. So its change when the parameter grows by 1 is
        the exact derivative, up to rounding.

        Returns:
            A dictionary from the name of each array to the derivatives by its entries, an array of shape (number of
            entries, in_features, out_features).
        """
        leaves = {k: np.asarray(v, np.float64) for k, v in matrix.arrays().items()}
        here, result = self.dense(leaves, matrix.shape), {}
        for name, leaf in leaves.items():
            steps = np.eye(leaf.size).reshape(leaf.size, *leaf.shape)
            result[name] = np.stack([self.dense({**leaves, name: leaf + s}, matrix.shape) - here for s in steps])
        return result

    # Product and dense form

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize("shape", fast(SHAPES, (7, 7), (5, 12)), ids=str)
    def test_apply_and_to_dense(self, shape):
        matrix, M = self.create(shape)
        assert matrix.shape == shape
        batches = BATCHES if shape in SMALL[2:4] else BATCHES[1:2]
        inputs = [np.random.default_rng(1).normal(size=(*batch, shape[0])) for batch in batches]
        outputs, dense = jax.jit(lambda m, inputs: ([m.apply(x) for x in inputs], m.to_dense()))(matrix, inputs)
        assert_close(dense, M)
        for x, y in zip(inputs, outputs, strict=True):
            assert y.dtype == jnp.float64
            assert_close(y, x @ M)

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize("shape", fast(SMALL, (5, 12)), ids=str)
    def test_rows(self, shape):
        matrix, M = self.create(shape)
        ids = np.random.default_rng(1).integers(0, shape[0], (2, 5))
        assert_close(jax.jit(rows)(matrix, ids), M[ids])

    @pytest.mark.parametrize("shape", fast([(1, 1), (3, 3), (768, 768), (768, 501)], (3, 3)), ids=str)
    def test_apply_in_float32(self, shape):
        matrix, M = self.create(shape, "float32")
        x = np.random.default_rng(1).normal(size=(5, shape[0])).astype(np.float32)
        y = matrix.apply(x)
        assert y.dtype == jnp.float32
        assert_close(y, np.asarray(x, np.float64) @ M, "float32")

    def test_apply_to_an_empty_batch(self):
        matrix, _ = self.create((3, 2), "float32")
        assert matrix.apply(jnp.zeros((0, 5, 3))).shape == (0, 5, 2)

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize("shape", fast(SMALL, (5, 12)), ids=str)
    def test_transpose_and_adjoint_identity(self, shape):
        matrix, M = self.create(shape)
        x, y = (np.random.default_rng(n).normal(size=n) for n in shape)
        assert type(matrix.T) is self.family and matrix.T.shape == shape[::-1]
        forth, back, twice = jax.jit(lambda m, x, y: (m.apply(x), m.T.apply(y), m.T.T.to_dense()))(matrix, x, y)
        assert_close(back, y @ M.T)
        assert_close(twice, M)
        size = np.linalg.norm(x) * np.linalg.norm(M) * np.linalg.norm(y)
        assert abs(np.dot(forth, y) - np.dot(x, back)) <= TOLERANCES["float64"] * size

    @pytest.mark.usefixtures("x64")
    def test_compact_is_the_same_matrix_in_no_more_numbers(self):
        matrix, M = self.create((5, 12))
        compact = matrix.compact()
        assert compact.num_params <= matrix.num_params
        assert compact.compact().num_params == compact.num_params
        assert_close(dense_of(compact), M)

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize("shape", fast([(7, 7), (5, 12)], (5, 12)), ids=str)
    def test_absorb_gives_the_multiple_of_the_same_structure(self, shape):
        """Check `absorb` with a number, and with a traced array, of which other values need no new compilation."""
        matrix, M = self.create(shape)
        x, traces = np.random.default_rng(1).normal(size=(4, shape[0])), []
        scaled = matrix.absorb(-1.5)
        assert jax.tree.structure(scaled) == jax.tree.structure(matrix)
        assert scaled.num_params == matrix.num_params
        assert_close(scaled.to_dense(), -1.5 * M)

        @jax.jit
        def apply(matrix, x, alpha):
            traces.append(shape)
            return matrix.absorb(alpha).apply(x)

        for alpha in (0.0, 1.0, 0.3):
            assert_close(apply(matrix, x, jnp.asarray(alpha)), alpha * (x @ M))
        assert len(traces) == 1

    def test_absorb_keeps_the_dtype_of_the_parameters(self):
        matrix, M = self.create((5, 3), "float32")
        half = matrix.with_arrays(**{name: leaf.astype("bfloat16") for name, leaf in matrix.arrays().items()})
        scaled = half.absorb(jnp.float32(0.5))
        assert {leaf.dtype for leaf in scaled.arrays().values()} == {jnp.dtype("bfloat16")}
        assert_close(dense_of(scaled), 0.5 * self.oracle(half.arrays(), (5, 3)), "float32")
        assert_close(dense_of(matrix.absorb(1.0)), M, "float32")

    # Gradients and transformations

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize(
        ("shape", "checkpoint"),
        fast([*((shape, False) for shape in SMALL), ((7, 7), True), ((5, 12), True)], ((5, 12), False), unpack=True),
        ids=str,
    )
    def test_gradients_of_every_leaf_and_of_x(self, shape, checkpoint):
        matrix, M = self.create(shape)
        rng = np.random.default_rng(2)
        x, dy = rng.normal(size=(2, 3, shape[0])), rng.normal(size=(2, 3, shape[1]))
        apply = jax.checkpoint(type(matrix).apply) if checkpoint else type(matrix).apply
        grad, dx = jax.jit(lambda matrix, x, dy: jax.vjp(apply, matrix, x)[1](dy))(matrix, x, dy)
        assert_close(dx, dy @ M.T)
        dM = np.einsum("abi,abo->io", x, dy)
        for name, tangent in self.tangents(matrix).items():
            expected = np.einsum("kio,io->k", tangent, dM).reshape(grad.arrays()[name].shape)
            assert_close(grad.arrays()[name], expected)

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize("shape", fast([(7, 7), (5, 12), (12, 5)], (12, 5)), ids=str)
    def test_jvp(self, shape):
        matrix, M = self.create(shape)
        direction, _ = self.create(shape, seed=3)
        rng = np.random.default_rng(2)
        x, dx = rng.normal(size=(3, shape[0])), rng.normal(size=(3, shape[0]))
        apply = type(matrix).apply
        _, dy = jax.jit(lambda *at, by: jax.jvp(apply, at, by))(matrix, x, by=(direction, dx))
        moves = direction.arrays()
        dM = sum(np.einsum("k,kio->io", np.ravel(moves[k]), t) for k, t in self.tangents(matrix).items())
        assert_close(dy, dx @ M + x @ dM)

    @pytest.mark.exhaustive
    def test_export_round_trip(self):
        pytest.importorskip("flatbuffers", reason="jax writes an exported function with flatbuffers")
        matrix, M = self.create((5, 3), "float32")
        x = np.random.default_rng(1).normal(size=(2, 5)).astype(np.float32)
        apply = jax.jit(lambda leaves, x: matrix.with_arrays(**leaves).apply(x))
        exported = jax.export.export(apply)(matrix.arrays(), x).serialize()
        y = jax.export.deserialize(exported).call(matrix.arrays(), x)
        assert_close(y, np.asarray(x, np.float64) @ M, "float32")

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize("shape", fast([(7, 7), (5, 12)], (5, 12)), ids=str)
    def test_vmap_over_inputs_and_over_matrices(self, shape):
        matrices = [self.create(shape, seed=seed) for seed in range(3)]
        stack = jax.tree.map(lambda *leaves: np.stack(leaves), *(matrix for matrix, _ in matrices))
        x = np.random.default_rng(1).normal(size=(3, 4, shape[0]))
        apply = type(matrices[0][0]).apply
        mapped = jax.jit(jax.vmap(apply, in_axes=(None, 1), out_axes=1))(matrices[0][0], x)
        assert_close(mapped, x @ matrices[0][1])
        assert_close(
            jax.jit(jax.vmap(apply))(stack, x), np.stack([x @ M for x, (_, M) in zip(x, matrices, strict=True)])
        )
        assert_close(jax.jit(jax.vmap(lambda m: m.T.to_dense()))(stack), np.stack([M.T for _, M in matrices]))

    # Precision

    @pytest.mark.parametrize("precision", fast(["bfloat16", "float16"]))
    @pytest.mark.parametrize("shape", fast([(768, 768), (55, 96)], (55, 96)), ids=str)
    def test_half_precision_input_is_rounded_once(self, precision, shape):
        matrix, M = self.create(shape, "float32")
        x = np.random.default_rng(1).normal(size=(5, shape[0])).astype(jnp.dtype(precision))
        y = jax.jit(type(matrix).apply)(matrix, x)
        assert y.dtype == precision
        assert_close(y, np.asarray(x, np.float64) @ M, precision)

    def test_half_precision_parameters_stay_and_are_not_rounded_again(self):
        matrix, M = self.create((96, 55), "bfloat16")
        x = np.random.default_rng(1).normal(size=(5, 96)).astype(np.float32)

        def results(matrix):
            return matrix.apply(x), matrix.to_dense(), matrix.compact().to_dense()

        y, dense, fused = jax.jit(results)(matrix)
        assert_close(y, np.asarray(x, np.float64) @ M, "float32")
        assert dense.dtype == fused.dtype == jnp.float32
        assert_close(dense, M, "float32")
        assert_close(fused, M, "float32")
        grad = jax.jit(jax.grad(lambda m: jnp.sum(m.apply(x))))(matrix)
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(grad))

    @pytest.mark.exhaustive
    @pytest.mark.usefixtures("x64")
    def test_double_parameters_work_in_double_on_single_input(self):
        matrix, _ = self.create((96, 55))
        x = jax.random.normal(jax.random.key(1), (5, 96), jnp.float32)
        y = matrix.apply(x)
        assert y.dtype == jnp.float32
        np.testing.assert_array_equal(y, np.asarray(matrix.apply(x.astype(jnp.float64)), np.float32))

    # Pytrees, and access to arrays by name

    def test_tree_round_trip(self):
        matrix, _ = self.create((5, 3), "float32")
        leaves, structure = jax.tree.flatten(matrix)
        assert [id(leaf) for leaf in leaves] == [id(leaf) for leaf in matrix.arrays().values()]
        again = jax.tree.unflatten(structure, leaves)
        assert again == matrix and hash(again) == hash(matrix) and again.shape == (5, 3)
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(matrix)]
        assert paths == [self.path(name) for name in matrix.arrays()]
        assert jax.tree.structure(jax.tree.map(lambda leaf: "placeholder", matrix)) == structure
        other, _ = self.create((5, 3), "float32", seed=1)
        assert other != matrix and jax.tree.structure(other) == structure

    def test_is_frozen(self):
        matrix, _ = self.create((5, 3), "float32")
        with pytest.raises(AttributeError):
            setattr(matrix, next(iter(matrix.arrays())), None)

    def test_shapes_without_arrays(self):
        abstract = self.abstract((400, 300))
        assert abstract.shape == (400, 300)
        assert abstract.num_params == sum(leaf.size for leaf in jax.tree.leaves(abstract))
        assert all(f"{self.field(name)}=float32[" in repr(abstract) for name in abstract.arrays())

    def test_with_arrays_replaces_empties_and_fills(self):
        matrix, _ = self.create((5, 3), "float32")
        other, _ = self.create((5, 3), "float32", seed=1)
        assert matrix.with_arrays(**other.arrays()) == other
        assert matrix.with_arrays() == matrix
        empty, same = (m.with_arrays(**dict.fromkeys(m.arrays())) for m in (matrix, other))
        assert empty == same and hash(empty) == hash(same)
        assert "None" in repr(empty)
        assert empty.with_arrays(**matrix.arrays()) == matrix

    def test_compiles_once_for_new_values(self):
        traces = []

        @jax.jit
        def apply(matrix, x):
            traces.append(matrix.shape)
            return matrix.apply(x)

        for seed in range(3):
            apply(self.create((5, 3), "float32", seed)[0], jnp.ones(5))
        assert traces == [(5, 3)]

    # Wrong arguments

    def test_wrong_input_width(self):
        matrix, _ = self.create((5, 3), "float32")
        for x in (jnp.ones((2, 3)), jnp.ones(())):
            with pytest.raises(UserError, match=r"apply: x must end in the matrix's 5 input features \(5 x 3\)"):
                matrix.apply(x)

    @pytest.mark.parametrize("dtype", ["int32", "complex64"])
    def test_input_that_is_not_real_floating_point(self, dtype):
        matrix, _ = self.create((5, 3), "float32")
        with pytest.raises(UserError, match=f"must be real floating point, not {dtype}"):
            matrix.apply(jnp.ones(5, dtype))

    def test_unknown_array_name(self):
        matrix, _ = self.create((5, 3), "float32")
        names = ", ".join(matrix.arrays())
        with pytest.raises(UserError, match=f"{self.family.__name__} has no array 'kernel'.*its arrays are {names}"):
            matrix.with_arrays(kernel=jnp.ones(5))

    def test_wrong_arrays(self):
        matrix, _ = self.create((5, 3), "float32")
        for name, leaf in matrix.arrays().items():
            field = self.field(name)
            with pytest.raises(UserError, match=rf"{field} must .*shape"):
                matrix.with_arrays(**{name: jnp.stack([leaf, leaf], axis=-1)[None]})
            with pytest.raises(UserError, match=f"{field} must be real floating point, not int32"):
                matrix.with_arrays(**{name: leaf.astype("int32")})
            with pytest.raises(UserError, match=f"{field} must be an array"):
                matrix.with_arrays(**{name: 1.0})


class StructuredMatrixContract(MatrixContract):
    """The tests that every family must pass. A subclass sets `family` and defines the method `dense`."""

    family: type[Family]

    def options(self, shape: tuple[int, int]) -> dict[str, Any]:
        """Return the options with which the tests call `init` and `nearest`, by default those of a small matrix.

        Args:
            shape: `(in_features, out_features)`.
        """
        m, n = shape
        return next(filter(None, (self.family.options_within(shape, size) for size in (3 * max(m, n), m * n))), {})

    def example(self) -> Family:
        """Return a small matrix of the family. A subclass overrides it if its tests use other options."""
        return self.family.example()

    def nearest_options(self, shape: tuple[int, int]) -> dict[str, Any]:
        """Return the options with which the tests call `nearest`. An iterative search makes no steps by default."""
        return self.options(shape) | ({"steps": 0} if self.family.searches else {})

    def abstract(self, shape):
        key = jax.random.key(0)
        return jax.eval_shape(lambda: self.family.init(key, shape, scale=1.0, **self.options(shape)))

    @pytest.mark.usefixtures("x64")
    def test_the_example_is_a_member_that_its_options_make_again(self):
        example = self.example()
        M = self.oracle(example.arrays(), example.shape)
        assert np.all(np.isfinite(M)) and np.any(M)
        assert_close(dense_of(example), M, "float32")
        assert example.title and self.family.count(example.shape, **example.options()) == example.num_params
        again = self.family.init(jax.random.key(0), example.shape, scale=1.0, **example.options())
        assert jax.tree.structure(again) == jax.tree.structure(example)
        steps = {"steps": 0} if self.family.searches else {}
        assert jax.tree.structure(self.family.nearest(M, **example.options(), **steps)) == jax.tree.structure(example)
        assert self.family.options_from(example.shape, {"rank": 1, "f": 0.5}).keys() <= {*self.family.option_names}

    @pytest.mark.parametrize("shape", fast([(1, 1), (7, 7), (2, 3), (12, 5)], (2, 3)), ids=str)
    def test_init_is_zero_and_can_learn(self, shape):
        def start(key, x):
            matrix = self.family.init(key, shape, scale=1.0, **self.options(shape))
            return matrix, matrix.to_dense(), jax.grad(lambda m: jnp.sum(m.apply(x)))(matrix)

        matrix, dense, grad = jax.jit(start)(jax.random.key(0), jnp.arange(1.0, shape[0] + 1))
        assert matrix.shape == shape
        assert all(leaf.dtype == jnp.float32 for leaf in matrix.arrays().values())
        assert not np.any(dense)
        assert any(np.any(leaf) for leaf in jax.tree.leaves(grad))

    def test_init_follows_its_key_scale_and_dtype(self):
        def init(seed, scale, dtype="float32"):
            matrix = self.family.init(
                jax.random.key(seed), (400, 300), scale=scale, dtype=dtype, **self.options((9, 9))
            )
            return matrix.arrays()

        small, half, other = init(0, 0.02), init(0, 1.0, "bfloat16"), init(1, 1.0)
        of_numpy, traced = init(0, np.float64(1), "bfloat16"), jax.jit(lambda scale: init(0, scale, "bfloat16"))(1.0)
        for name, leaf in init(0, 1.0).items():
            assert {arrays[name].dtype for arrays in (half, of_numpy, traced)} == {jnp.dtype("bfloat16")}
            np.testing.assert_allclose(small[name], 0.02 * np.asarray(leaf), rtol=1e-6)
            if np.any(leaf):
                assert not np.array_equal(leaf, other[name])
                assert abs(np.std(leaf) - 1) < 0.15

    @pytest.mark.exhaustive
    def test_nearest_of_a_half_precision_matrix_is_float32(self):
        _, M = self.create((4, 3), "float32")
        found = self.family.nearest(jnp.asarray(M, jnp.bfloat16), **self.nearest_options((4, 3)))
        assert all(leaf.dtype == jnp.float32 for leaf in found.arrays().values())

    @pytest.mark.parametrize("shape", [(0, 3), (3,), (2, 3, 4), (2.0, 3), None], ids=str)
    def test_impossible_shape(self, shape):
        with pytest.raises(UserError, match=r"shape must be \(in_features, out_features\), two positive integers"):
            self.family.init(jax.random.key(0), shape, scale=1.0, **self.options((2, 3)))

    @pytest.mark.parametrize("shape", [(3,), (0, 3), (1, 2, 3)], ids=str)
    def test_nearest_to_what_is_no_matrix(self, shape):
        for dense in (jnp.ones(shape), jnp.ones((2, 3), int)):
            with pytest.raises(UserError, match=r"nearest\(\) takes a non-empty floating-point matrix"):
                self.family.nearest(dense, **self.nearest_options((2, 3)))


class ProjectionContract(StructuredMatrixContract):
    """The tests of a family whose method `nearest` computes the best approximation by a formula.

    The test classes of the other families test their searches.
    """

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize("shape", fast(SMALL, (5, 12)), ids=str)
    def test_nearest_finds_members_again_and_nothing_near_it_is_nearer(self, shape):
        nearest = jax.jit(lambda dense: self.family.nearest(dense, **self.nearest_options(shape)))
        _, M = self.create(shape)
        found = nearest(M)
        assert type(found) is self.family and found.shape == shape
        assert_close(self.oracle(found.arrays(), shape), M)

        target = np.random.default_rng(4).normal(size=shape)
        found = nearest(target)
        leaves = {k: np.asarray(v) for k, v in found.arrays().items()}
        distance = np.linalg.norm(target - self.dense(leaves, shape))
        rng = np.random.default_rng(5)
        for step, _ in itertools.product((1e-3, 1e-1, 1.0), range(20)):
            moved = {k: v + step * rng.normal(size=v.shape) for k, v in leaves.items()}
            assert np.linalg.norm(target - self.dense(moved, shape)) >= distance * (1 - TOLERANCES["float64"])
        # Check the first-order condition: the error is orthogonal to the derivative with respect to every parameter.
        for tangent in self.tangents(found).values():
            slope = np.einsum("kio,io->k", tangent, target - self.dense(leaves, shape))
            assert np.linalg.norm(slope) <= TOLERANCES["float64"] * np.linalg.norm(tangent) * np.linalg.norm(target)
