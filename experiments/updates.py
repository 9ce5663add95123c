"""Measure the changes that fine-tuning makes to the kernels of a network: rank, condition number and norm."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from experiments.tables import markdown
from surm_jax.paths import join
from surm_jax.peft import KernelPart, iter_parts, kernel_change
from surm_jax.peft.kernels import kernel_of
from surm_jax.structured import (
    BlockCirculant,
    Circulant,
    Kronecker,
    LowRank,
    SkewCirculant,
    StructuredMatrix,
    SymmetricToeplitzPair,
    ToeplitzPair,
    displacement_rank,
    numerical_rank,
    singular_values,
)


def kernels(model: nnx.Module) -> dict[str, Float[Array, "in out"]]:
    """Return the kernels of all linear layers outside the head as matrices (in_features, out_features), by path.

    They are sorted by the path of the layer inside its block (`kind_of`), and then by the number of the block.

    >>> model = nnx.Dict(head=nnx.Linear(4, 2, rngs=nnx.Rngs(0)), up=nnx.Linear(2, 4, rngs=nnx.Rngs(1)))
    >>> {path: kernel.shape for path, kernel in kernels(model).items()}
    {'up': (2, 4)}
    """
    found = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear | nnx.LinearGeneral) and path[0] != "head":
            found[join(path)] = kernel_of(module, join(path)).matrices()
    return dict(sorted(found.items(), key=lambda item: (kind_of(item[0]), block_of(item[0]) or 0)))


def kind_of(path: str) -> str:
    """Return the path of a layer inside its block, which is the same for corresponding layers of all blocks.

    For a layer outside the blocks it is the whole path.

    >>> kind_of("blocks/11/attention/query"), kind_of("pooler")
    ('attention/query', 'pooler')
    """
    return re.sub(r"^blocks/\d+/", "", path)


def block_of(path: str) -> int | None:
    """Return the number of the block that a layer belongs to, or None if it is outside the blocks.

    >>> block_of("blocks/11/attention/query"), block_of("pooler")
    (11, None)
    """
    match = re.match(r"blocks/(\d+)/", path)
    return int(match[1]) if match else None


class Change(NamedTuple):
    """The change of one kernel by fine-tuning.

    Attributes:
        before: The kernel before fine-tuning, in float64.
        added: The change of the kernel as a dense matrix, in float64.
        matrix: The change as a structured matrix. None if the kernel itself was trained, or if the change also depends
            on the kernel, as in DoRA.
    """

    before: Float[np.ndarray, "in out"]
    added: Float[np.ndarray, "in out"]
    matrix: StructuredMatrix | None


def changes(base: nnx.Module, tuned: nnx.Module) -> dict[str, Change]:
    """Return the change of every kernel that was itself trained or has an update, by the path of the layer.

    Args:
        base: The pretrained model.
        tuned: The model after fine-tuning.
    """
    parts = {row.path: row for row in iter_parts(tuned) if isinstance(row.part, KernelPart)}
    before, found = kernels(base), {}
    for path, kernel in kernels(tuned).items():
        was, now = (np.asarray(one).astype(np.float64) for one in (before[path], kernel))
        trained, row = not np.array_equal(was, now), parts.get(path)
        if row:
            added = now - was + np.asarray(kernel_change(row))
            found[path] = Change(was, added, None if trained else row.part.plain_matrix())
        elif trained:
            found[path] = Change(was, now - was, None)
    return found


class Update(NamedTuple):
    """The measurements of the change of one kernel.

    Attributes:
        layer: The path of the layer.
        rows: The number of rows of the kernel, in_features.
        columns: The number of columns of the kernel, out_features.
        family: The name of the family of structured matrices, or "dense".
        numbers: The number of parameters of the change.
        rank: The numerical rank.
        largest_rank: The largest rank that a matrix of this structure and size can have.
        theory: The rank that theory predicts from the structure, as text. It is empty for a dense change.
        stable_rank: The squared Frobenius norm over the square of the largest singular value. It tells how many
            singular directions carry most of the change.
        condition: The condition number: the largest singular value over the smallest that the structure allows to
            differ from zero.
        displacement_rank: The displacement rank. It is an empty string for a dense change.
        relative_norm: The Frobenius norm of the change over that of the kernel before fine-tuning.
        one_minus_cosine: One minus the cosine similarity of the kernels before and after fine-tuning.
    """

    layer: str
    rows: int
    columns: int
    family: str
    numbers: int
    rank: int
    largest_rank: int
    theory: str
    stable_rank: float
    condition: float
    displacement_rank: int | str
    relative_norm: float
    one_minus_cosine: float


def examine(layer: str, change: Change) -> Update:
    """Measure the change of a kernel.

    Ranks are computed with the tolerances of float32, because changes are trained in float32.

    Args:
        layer: The path of the layer.
        change: The change of its kernel.
    """
    added = change.added.astype(np.float32)
    values = singular_values(added)
    rank, matrix = numerical_rank(added), change.matrix
    largest = min(added.shape) if matrix is None else largest_rank(matrix)
    last = values[largest - 1]
    return Update(
        layer=layer,
        rows=added.shape[0],
        columns=added.shape[1],
        family="dense" if matrix is None else type(matrix).__name__,
        numbers=added.size if matrix is None else matrix.num_params,
        rank=rank,
        largest_rank=largest,
        theory="" if matrix is None else rank_in_theory(matrix),
        stable_rank=float(np.sum(np.square(values)) / values[0] ** 2) if rank else 0.0,
        condition=float(values[0] / last) if last else math.inf,
        displacement_rank="" if matrix is None else displacement_rank(added),
        relative_norm=float(np.linalg.norm(change.added) / np.linalg.norm(change.before)),
        one_minus_cosine=one_minus_cosine(change.before, change.before + change.added),
    )


def one_minus_cosine(one: Float[np.ndarray, "in out"], other: Float[np.ndarray, "in out"]) -> float:
    """Return one minus the cosine similarity of two matrices, each taken as one long vector.

    It is computed as half of the squared distance of the normalised matrices. Subtracting a cosine near 1 from 1 would
    lose most digits.

    In the example, a multiple of a matrix has the value 0, and two matrices without a common non-zero entry have the
    value 1.

    >>> round(one_minus_cosine(np.eye(2), 3 * np.eye(2)), 12), round(one_minus_cosine(np.eye(2), np.eye(2)[::-1]), 12)
    (0.0, 1.0)
    """
    return float(np.sum(np.square(one / np.linalg.norm(one) - other / np.linalg.norm(other))) / 2)


def largest_rank(matrix: StructuredMatrix) -> int:
    """Return the largest rank that a matrix with the same family, shape and size of factors can have.

    The matrix in the example is the Kronecker product of a 32 x 24 and a 24 x 32 matrix, so its rank is at most
    24 * 24.

    >>> import jax
    >>> largest_rank(Kronecker.init(jax.random.key(0), (768, 768), scale=1.0))
    576
    """
    match matrix:
        case Kronecker():
            terms = zip(matrix.A, matrix.B, strict=True)
            return min(*matrix.shape, sum(min(A.shape) * min(B.shape) for A, B in terms))
        case LowRank():
            return min(*matrix.shape, matrix.rank)
    return min(matrix.shape)


def rank_in_theory(matrix: StructuredMatrix) -> str:
    """Return what theory says about the rank of a structured matrix, as text for a table.

    It begins with "=" and the rank if the parameters determine it, otherwise with "<=" and an upper bound. The text in
    parentheses says where this comes from. In the example, all entries of the matrix are ones, so one coefficient of
    its DFT (discrete Fourier transform) is not zero:

    >>> rank_in_theory(Circulant(np.ones(2, np.float32), shape=(2, 2)))
    '= 1 (non-zero DFT)'
    """
    m, n = matrix.shape
    match matrix:
        case Circulant() | SkewCirculant() if m == n:
            return f"= {numerical_rank(matrix)} (non-zero DFT)"
        case BlockCirculant():
            # A Fourier transform makes the matrix block-diagonal, with one block for each frequency. The rank is the
            # sum of the ranks of these blocks.
            blocks = np.moveaxis(np.fft.fft(np.asarray(matrix.c, np.float64)), -1, 0)
            values = np.linalg.svd(blocks, compute_uv=False)
            tolerance = values.max() * max(m, n) * np.finfo(np.float32).eps
            return f"= {np.count_nonzero(values > tolerance)} (DFT of the blocks)"
        case Kronecker():
            ranks = [(numerical_rank(A), numerical_rank(B)) for A, B in zip(matrix.A, matrix.B, strict=True)]
            if len(ranks) == 1:
                return f"= {ranks[0][0]} x {ranks[0][1]} (factors)"
            return f"<= {min(m, n, sum(a * b for a, b in ranks))} (sum of products)"
        case LowRank():
            return f"<= {matrix.rank} (columns)"
        case SymmetricToeplitzPair() | ToeplitzPair():
            return f"<= {min(map(numerical_rank, matrix.factors))} (factors)"
    return f"<= {min(m, n)}"


def update_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a markdown table of the changes of all kernels.

    Args:
        rows: The rows of a csv file with the fields of `Update` as columns.
    """
    numbers = {"stable rank": ".1f", "condition": ".3g", "norm, of the kernel's": ".3g", "1 - cosine": ".2g"}
    names = ("stable_rank", "condition", "relative_norm", "one_minus_cosine")
    lines = []
    for row in rows:
        lines.append(
            {
                "layer": row["layer"],
                "shape": f"{row['rows']} x {row['columns']}",
                "update": row["family"],
                "numbers": int(row["numbers"]),
                "rank": int(row["rank"]),
                "of at most": int(row["largest_rank"]),
                "in theory": row["theory"],
                "displacement rank": row["displacement_rank"],
                **{title: float(row[name]) for title, name in zip(numbers, names, strict=True)},
            }
        )
    columns = dict.fromkeys(("layer", "shape", "update"), "") | dict.fromkeys(("numbers", "rank", "of at most"), ",")
    return markdown(lines, columns | {"in theory": "", "displacement rank": ">"} | numbers)
