"""What every method must compute, by NumPy and SciPy, and the shapes that its arrays have in adapter files."""

from collections.abc import Callable

import numpy as np
import scipy.linalg
import scipy.special

from surm_jax.structured import near_square_factors

Arrays = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]


def circulant(c: np.ndarray, m: int, n: int) -> np.ndarray:
    """Return the (m, n) circulant M for `x @ M`, the transpose of the paper's matrix."""
    return scipy.linalg.circulant(c).T[:m, :n]


def kronecker(arrays: Arrays) -> np.ndarray:
    return sum(np.kron(a.T, b.T) for a, b in zip(arrays["A"], arrays["B"], strict=True)).T


def low_rank(arrays: Arrays) -> np.ndarray:
    return arrays["down"] @ arrays["up"]


def low_displacement(arrays: Arrays, m: int, n: int) -> np.ndarray:
    """Return the transpose of the paper's W(G, H), the sum of products of a circulant and a skew-circulant matrix."""
    W = np.zeros((max(m, n),) * 2)
    for g, h in zip(arrays["G"].T, arrays["H"].T, strict=True):
        H = scipy.linalg.circulant(h)
        W += scipy.linalg.circulant(g) @ (np.tril(H) - np.triu(H, 1))
    return W.T[:m, :n]


def symmetric_toeplitz(arrays: Arrays, m: int, n: int) -> np.ndarray:
    return (scipy.linalg.toeplitz(arrays["t2"]) @ scipy.linalg.toeplitz(arrays["t1"])).T[:m, :n]


def toeplitz(arrays: Arrays, m: int, n: int) -> np.ndarray:
    T1, T2 = (
        scipy.linalg.toeplitz(c=t[size - 1 :], r=t[size - 1 :: -1])
        for t, size in ((arrays["t1"], m), (arrays["t2"], max(m, n)))
    )
    return (T2 @ T1).T


def low_rank_kronecker(arrays: Arrays) -> np.ndarray:
    return sum(np.kron(a, u @ v) for a, u, v in zip(arrays["A"], arrays["down"], arrays["up"], strict=True))


def toeplitz_product(arrays: Arrays, m: int, n: int) -> np.ndarray:
    t = arrays["factors_0_t"]
    return scipy.linalg.toeplitz(c=t[m - 1 :: -1], r=t[m - 1 :]) @ scipy.linalg.toeplitz(arrays["factors_1_t"])


def weight_decomposed(alpha: float, arrays: Arrays, W: np.ndarray) -> np.ndarray:
    moved = W + alpha * low_rank(arrays)
    return arrays["magnitude"] * moved / np.linalg.norm(moved, axis=0) - W


def monarch(arrays: Arrays) -> np.ndarray:
    """Return the Monarch matrix of the blocks R and L, by summing over the inner features t."""
    (N, p, r), s = arrays["R"].shape, arrays["L"].shape[2]
    M = np.zeros((N * p, N * s))
    for t in range(N * r):
        k, b = t // r, t % N
        M[k * p : (k + 1) * p, b::N] += np.outer(arrays["R"][k, :, t % r], arrays["L"][b, t // N])
    return M


def block_low_rank(arrays: Arrays) -> np.ndarray:
    return np.block(
        [[D @ U for D, U in zip(*row, strict=True)] for row in zip(arrays["down"], arrays["up"], strict=True)]
    )


def khatri_rao(arrays: Arrays, m: int, n: int) -> np.ndarray:
    rows = np.stack([np.kron(v, u) for v, u in zip(arrays["V"], arrays["U"], strict=True)])[:, : max(m, n)]
    return rows.T if m > n else rows


def khatri_rao_shapes(m, n):
    width = int(np.sqrt(min(m, n)))
    return {"U": (min(m, n), width), "V": (min(m, n), -(-max(m, n) // width))}


def spectral_shapes(m, n):
    """Return the shapes of the arrays that an adapter file stores for SMoA with three blocks of ranks 2, 1 and 1."""
    sizes = zip(*([len(part) for part in np.array_split(np.arange(size), 3)] for size in (m, n, 4)), strict=True)
    shapes = {"row_places": (m,), "column_places": (n,)}
    for k, (rows, columns, rank) in enumerate(sizes):
        shapes |= {f"terms_{k}_matrix_down": (rows, rank), f"terms_{k}_matrix_up": (rank, columns)}
    return shapes


def learned_function(arrays: Arrays) -> np.ndarray:
    """Return `sum_k a_k sin(w_k (z - c_k)) / (w_k (z - c_k))` for the entries z of a low-rank matrix."""
    z, total = low_rank(arrays), 0
    for a, width, c in zip(arrays["a"], arrays["width"], np.linspace(-2, 2, 8), strict=True):
        u = np.log1p(np.exp(width)) * (z - c)
        total = total + a * np.sin(u) / u
    return total


def spectral_blocks(arrays: Arrays, W: np.ndarray) -> np.ndarray:
    """Return SMoA's change for alpha / rank = 1, with the order of rows and columns from W itself."""
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    energies = (U * S) ** 2, (Vt.T * S) ** 2
    orders = [np.argsort(energy @ np.arange(len(S)) / energy.sum(1), kind="stable") for energy in energies]
    change = np.zeros_like(W)
    number = sum(name.endswith("_up") for name in arrays)
    blocks = zip(*(np.array_split(order, number) for order in orders), strict=True)
    for k, (rows, columns) in enumerate(blocks):
        where = np.ix_(rows, columns)
        change[where] = W[where] * (arrays[f"terms_{k}_matrix_down"] @ arrays[f"terms_{k}_matrix_up"])
    return change


def low_rank_shapes(m, n):
    return {"down": (m, 2), "up": (2, n)}


def low_rank_kronecker_shapes(m, n, terms, side, rank):
    """Return the shapes of the stored arrays of a sum of `terms` Kronecker products, by name.

    The first factors have the shape (side, side), and the second factors are `down @ up` with the given rank. They are
    stored as a whole if that takes fewer entries.
    """
    m2, n2 = m // side, n // side
    if m2 * n2 < rank * (m2 + n2):
        return {"A": (terms, side, side), "B": (terms, m2, n2)}
    return {"A": (terms, side, side), "down": (terms, m2, rank), "up": (terms, rank, n2)}


def kronecker_shapes(m, n):
    left, right = near_square_factors((m, n))
    return {"A": (1, *left), "B": (1, *right)}


def biased(shapes: Shapes, width: int) -> Shapes:
    return {**{f"down/{name}": shape for name, shape in shapes.items()}, "bias": (width,)}


def waisted_shapes(width, waist):
    return {"down/W": (width, waist), "down_bias": (waist,), "up/W": (waist, width), "bias": (width,)}


def below(arrays: Arrays) -> Arrays:
    return {name.removeprefix("down/"): array for name, array in arrays.items()}


def surm(alpha: float, act: Callable, matrix: Callable[[Arrays, int, int], np.ndarray]):
    """Return a function that computes SURM's branch `alpha * (act(y M) + b)` from its arrays and y."""

    def branch(arrays, y):
        d = y.shape[-1]
        return alpha * (act(y @ matrix(below(arrays), d, d)) + arrays.get("bias", 0))

    return branch


def waisted(alpha: float, act: Callable, matrix: Callable[[Arrays], np.ndarray] = lambda arrays: arrays["W"]):
    """Return a function that computes a bottleneck branch `alpha * (act(y D + d) U + b)` from its arrays and y.

    The names of the arrays of D begin with `down/`, and those of U with `up/`.
    """

    def branch(arrays, y):
        D, U = (matrix({k[len(n) :]: a for k, a in arrays.items() if k.startswith(n)}) for n in ("down/", "up/"))
        hidden = act(y @ D + arrays.get("down_bias", 0))
        return alpha * (hidden @ U + arrays.get("bias", 0))

    return branch


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + scipy.special.erf(x / np.sqrt(2))) / 2


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2
