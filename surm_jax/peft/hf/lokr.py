"""The file format of LoKr adapters (Kronecker products) in peft."""

from collections.abc import Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from surm_jax.errors import UserError
from surm_jax.peft.hf.format import Arrays, Format, LayerUpdate, Shapes, by_module, tidy
from surm_jax.peft.hf.settings import Settings
from surm_jax.peft.methods.matrices.hypercomplex import LoKr, balanced_factors
from surm_jax.peft.methods.update import Update
from surm_jax.structured import Kronecker, LowRankKronecker, StructuredMatrix

Sizes = tuple[tuple[int, int], tuple[int, int]]


class LoKrFormat(Format):
    """The file format of LoKr, which stores the two factors of a Kronecker product for each layer.

    The update in peft is `alpha / r * kron(w1, w2)`, the transpose of our update `factor * kron(A, B)`. So w1 is A^T
    and w2 is B^T. The setting `decompose_factor`, which all layers share, determines the shapes of w1 and w2.

    If `r` is less than half of the larger dimension of w2, then w2 is stored as a product `w2_a @ w2_b` of rank r,
    where w2_a is up^T and w2_b is down^T of our `LowRankKronecker`. Otherwise w2 is stored as one matrix, and r affects
    nothing but the scale `alpha / r`. With the setting `decompose_both`, w1 may also be stored as a product. Such files
    can be read, but w1 is always written as one matrix.
    """

    peft_type = "LOKR"
    settings = frozenset({"r", "alpha", "rank_pattern", "alpha_pattern", "decompose_factor", "decompose_both"})
    mark = "lokr_"
    description = "one Kronecker product"

    def holds(self, matrix: StructuredMatrix) -> bool:
        """Return whether a matrix is a single Kronecker product, not a sum of several."""
        return isinstance(matrix, Kronecker | LowRankKronecker) and matrix.terms == 1

    def write(self, updates: Mapping[str, LayerUpdate]) -> tuple[dict[str, Any], dict[str, Arrays]]:
        """Return the settings and the tensors that store the updates of all modules.

        The settings contain `decompose_factor`, ranks and alphas. The tensors of a module are the two factors of its
        Kronecker product.

        Raises:
            UserError: If no single `decompose_factor` makes peft choose the factor shapes of every update.
        """
        low = {module: update.matrix.rank for module, update in updates.items() if _is_low_rank(update.matrix)}
        # If w2 is stored as one matrix, r may have any value of at least half of the larger dimension of w2. All such
        # layers get the same value, which is at least as large as the rank of each other layer.
        least = [
            -(-max(update.matrix.factor_shapes[1]) // 2) for module, update in updates.items() if module not in low
        ]
        dense = max([*low.values(), *least])
        ranks = {module: low.get(module, dense) for module in updates}
        alphas = {module: tidy(update.factor * ranks[module]) for module, update in updates.items()}
        settings = {
            **by_module("r", "rank_pattern", ranks),
            **by_module("alpha", "alpha_pattern", alphas),
            "decompose_factor": _decompose_factor(updates),
        }
        return settings, {module: _factors(update.matrix) for module, update in updates.items()}

    def read_settings(self, settings: Settings, module: str, shape: tuple[int, int]) -> tuple[Update, Shapes]:
        """Return a `LoKr` method with the rank, alpha and factor shapes in the settings, and the shapes of the tensors.

        Raises:
            UserError: If a setting has a value that is not allowed.
        """
        rank = int(settings.of_module("r", 8, "rank_pattern", module, whole=True))
        alpha = settings.of_module("alpha", 8, "alpha_pattern", module)
        factor = settings.values.get("decompose_factor", -1)
        if not isinstance(factor, int) or isinstance(factor, bool) or not (factor == -1 or factor > 0):
            raise settings.refusal("decompose_factor", "which must be -1 or a whole number of at least 1")
        update = LoKr(rank=rank, alpha=alpha, divisor=max(factor, 0))
        try:
            matrix = jax.eval_shape(lambda: update.init(jax.random.key(0), shape))
        except UserError as error:
            raise UserError(f"{settings.path} describes an impossible update of {module}: {error}") from None
        (m1, n1), (m2, n2) = matrix.factor_shapes
        shapes: Shapes = {"lokr_w1": (n1, m1)}
        if settings.flag("decompose_both") and rank < max(m1, n1) / 2:
            shapes = {"lokr_w1_a": (n1, rank), "lokr_w1_b": (rank, m1)}
        if rank < max(m2, n2) / 2:
            return update, shapes | {"lokr_w2_a": (n2, rank), "lokr_w2_b": (rank, m2)}
        return update, shapes | {"lokr_w2": (n2, m2)}

    def read(self, arrays: Arrays) -> Kronecker | LowRankKronecker:
        """Return the Kronecker product whose factors the tensors of a layer hold."""
        w1 = arrays["lokr_w1"] if "lokr_w1" in arrays else arrays["lokr_w1_a"] @ arrays["lokr_w1_b"]
        A = jnp.asarray(w1.T[None])
        if "lokr_w2" in arrays:
            return Kronecker(A=A, B=jnp.asarray(arrays["lokr_w2"].T[None]))
        w2_a, w2_b = arrays["lokr_w2_a"], arrays["lokr_w2_b"]
        if w2_a.shape[1] > min(w2_a.shape[0], w2_b.shape[1]):
            # If w2 is far from square, the rank in peft may exceed its smaller dimension. Our `LowRankKronecker` does
            # not allow this.
            return Kronecker(A=A, B=jnp.asarray((w2_a @ w2_b).T[None]))
        return LowRankKronecker(A=A, down=jnp.asarray(w2_b.T[None]), up=jnp.asarray(w2_a.T[None]))


def _is_low_rank(matrix: Kronecker | LowRankKronecker) -> TypeGuard[LowRankKronecker]:
    """Return whether peft stores the second factor of this matrix, w2, as a product of two matrices."""
    return isinstance(matrix, LowRankKronecker) and matrix.rank < max(matrix.factor_shapes[1]) / 2


def _factors(matrix: Kronecker | LowRankKronecker) -> Arrays:
    w1 = {"lokr_w1": np.asarray(matrix.A)[0].T}
    if _is_low_rank(matrix):
        return w1 | {"lokr_w2_a": np.asarray(matrix.up)[0].T, "lokr_w2_b": np.asarray(matrix.down)[0].T}
    if isinstance(matrix, Kronecker):
        return w1 | {"lokr_w2": np.asarray(matrix.B)[0].T}
    return w1 | {"lokr_w2": (np.asarray(matrix.down)[0] @ np.asarray(matrix.up)[0]).T}


def _decompose_factor(updates: Mapping[str, LayerUpdate]) -> int:
    """Return the value of `decompose_factor` for which peft gives all updates their factor shapes.

    Raises:
        UserError: If there is no such value.
    """
    wanted = {update.matrix.factor_shapes: update for update in updates.values()}
    largest = max(size for update in updates.values() for size in update.matrix.shape)
    for factor in (-1, *range(1, largest + 1)):
        if all(_sizes(update.matrix.shape, factor) == factors for factors, update in wanted.items()):
            return factor
    update = next(iter(updates.values()))
    given = _text(_sizes(update.matrix.shape, -1))
    raise UserError(
        f"no decompose_factor of peft's LoKr gives the factor sizes of these updates, such as"
        f" {_text(update.matrix.factor_shapes)} at {update.path} (-1 gives {given}): train"
        " with the method lokr, or merge the update into the model (surm_jax.merge, or --mode=merge)"
    )


def _sizes(shape: tuple[int, int], factor: int) -> Sizes:
    """Return the shapes (m1, n1) of A and (m2, n2) of B that peft uses for a kernel of this shape.

    `factor` is the value of the setting `decompose_factor`.
    """
    (m1, m2), (n1, n2) = (balanced_factors(size, max(factor, 0)) for size in shape)
    return (m1, n1), (m2, n2)


def _text(sizes: Sizes) -> str:
    return " (x) ".join(f"{m} x {n}" for m, n in sizes)
