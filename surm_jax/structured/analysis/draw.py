"""Pictures of structured matrices: every parameter has a colour, and the dense matrix shows where it appears.

`draw` shows any matrix of this package in the style of Figure 2 of arXiv 2406.17740. An entry that is a multiple of one
parameter has the colour of this parameter. An entry that is a product of parameters has the product of their colours. A
negative sign darkens the colour.

If some entries of a matrix are sums of products of parameters, all entries of this matrix are coloured by their values.
If a matrix is built as a product or sum of other matrices, these are shown beside it.

`draw` returns a `matplotlib.figure.Figure` and does not use pyplot. `surm_jax.structured` does not import this module,
so the rest of that package works without matplotlib.
"""

import re
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from surm_jax.errors import UserError
from surm_jax.structured.analysis.origins import origins
from surm_jax.structured.base import Piece, StructuredMatrix

INK, FAINT, EMPTY = "#22303c", "#8a96a3", "#f3f1ec"

PALETTES = tuple(
    LinearSegmentedColormap.from_list(name, colours)
    for name, colours in {
        # Nine hues of one lightness (OKLCH 0.76, 0.125), so that a product with a grey keeps the hue.
        "hues": "#8aafff #46c0ef #26cac3 #6ec88a #afba57 #dda64b #f49473 #f28eaa #d995dd".split(),
        "slate": "#eef1f4 #8393a6".split(),
        "dusk": "#e3b062 #de8285 #b07bb8 #7b7fca".split(),
        "moss": "#edf4ea #7fae8b".split(),
    }.items()
)
"""Colour maps for the parameters. Consecutive arrays of a matrix get consecutive colour maps, cyclically.

The colour maps are easy to tell apart. An entry that is a product of parameters from two consecutive arrays has the
product of their colours. These products are easy to tell apart, too.
"""

VALUES = LinearSegmentedColormap.from_list("values", ["#1f6391", "#8dbbd6", "#f6f4ef", "#efb392", "#b8432a"])
"""Colour map for matrices that are coloured by value, from negative values through zero to positive values."""

# In inches: the longest side of a drawn matrix, the space for a symbol between two matrices, the border of the figure.
BOX, GAP, MARGIN = 2.5, 0.5, 0.3
MOST_LETTERS = 9
"""Number that limits the size of matrices drawn in detail. Entries are labelled in matrices of at most (2 * 9)^2
entries. Lines between the entries are drawn in matrices of at most 4 * 9 rows and columns."""


def draw(matrix: StructuredMatrix) -> Figure:
    """Draw a structured matrix as a grid of coloured cells.

    If the matrix is a product or a sum of other matrices, its factors or terms are drawn to the left of it. Entries of
    small matrices are labelled with the parameters that they contain. The letters are those of the paper (arXiv
    2406.17740), and indices count from 0.

    Args:
        matrix: Any structured matrix, with at most some hundreds of rows and columns.

    Returns:
        A new figure. Save it with `figure.savefig("matrix.png", dpi=150)`.

    Raises:
        UserError: The argument is not a structured matrix, or an entry of it is not finite.

    >>> import jax.numpy as jnp
    >>> from surm_jax.structured import Circulant
    >>> figure = draw(Circulant(jnp.array([1.0, 2.0, 3.0]), shape=(3, 3)))
    >>> figure.get_suptitle()
    'Circulant, 3 x 3, 3 parameters'
    """
    if not isinstance(matrix, StructuredMatrix):
        raise UserError(f"draw takes a structured matrix, not {matrix!r}")
    values = _dense(matrix)
    if not np.all(np.isfinite(values)):
        raise UserError(f"draw: {matrix!r} holds numbers that are not finite")
    numbers = _colours(matrix)
    columns: list[_Column | str] = [
        f"${piece}$" if isinstance(piece, str) else _column(f"${piece.label}$", piece.matrix, _of_piece(piece, numbers))
        for piece in matrix.pieces()
    ]
    # Arrays of parameters are drawn above the factor or term that holds them. If there are no factors or terms, they
    # are drawn above the matrix itself.
    whole = _column("$M$", matrix, numbers, strips=not columns)
    columns += ["$=$", whole] if columns else [whole]
    m, n = matrix.shape
    count = f"{matrix.num_params:,} parameter{'s' * (matrix.num_params != 1)}"
    return _compose(columns, f"{type(matrix).__name__}, {m} x {n}, {count}")


class _Numbers(NamedTuple):
    """The colours and labels of the parameters in one array.

    Attributes:
        colours: RGB colours with values in [0, 1]. The shape is that of the array, with a last dimension of size 3.
        names: Labels in TeX. The shape is that of the array.
    """

    colours: Float[np.ndarray, "... 3"]
    names: np.ndarray


class _Grid(NamedTuple):
    """A drawn matrix: the colours and labels of its entries.

    Attributes:
        colours: RGB colours with values in [0, 1], of shape (rows, columns, 3).
        names: Labels in TeX, of shape (rows, columns), or None if the entries are not labelled.
    """

    colours: Float[np.ndarray, "rows columns 3"]
    names: np.ndarray | None


class _Column(NamedTuple):
    """A matrix in the picture, with everything that is drawn above and below it.

    Attributes:
        label: The text below the matrix, in TeX.
        grid: The entries of the matrix.
        strips: The arrays of parameters that are drawn above the matrix.
        range: The largest absolute value of the entries if they are coloured by value, otherwise None.
    """

    label: str
    grid: _Grid
    strips: list[_Grid]
    range: float | None


# Colours


def _colours(matrix: StructuredMatrix) -> dict[str, _Numbers]:
    """Return the colours and labels of all parameters of a matrix, in a dictionary by the name of their array.

    Each array uses one of the colour maps `PALETTES`. Parameters that are adjacent along the longest axis of the array
    have similar colours.
    """
    numbers = {}
    for i, (name, leaf) in enumerate(matrix.arrays().items()):
        axes = sorted(range(leaf.ndim), key=lambda axis: leaf.shape[axis])
        place = np.arange(leaf.size).reshape([leaf.shape[axis] for axis in axes]).transpose(np.argsort(axes))
        colours = np.asarray(PALETTES[i % len(PALETTES)](place / max(leaf.size - 1, 1)))[..., :3]
        names = np.full(leaf.shape, "", object)
        if leaf.size <= (2 * MOST_LETTERS) ** 2:
            for index in np.ndindex(leaf.shape):
                # An axis of size 1 needs no index, unless it is the only axis.
                names[index] = _letter(
                    name, *(k for k, n in zip(index, leaf.shape, strict=True) if n > 1 or leaf.ndim == 1)
                )
        numbers[name] = _Numbers(colours, names)
    return numbers


def _letter(name: str, *index: int) -> str:
    """Return the label of a parameter in TeX, such as `r_{1,0}` for the parameter `r1[0]`.

    For an array inside a sum or product, such as `terms_0_c`, the label uses only the last part of the name, `c`.
    """
    name = name.rpartition("_")[2]
    letter = name.rstrip("0123456789")
    digits = name.removeprefix(letter)
    if letter == "alpha":
        letter = "\\alpha"
    elif len(letter) > 1:
        letter = f"\\mathrm{{{letter}}}"
    subscript = ",".join([*filter(None, [digits]), *map(str, index)])
    return f"{letter}_{{{subscript}}}" if subscript else letter


def _of_piece(piece: Piece, numbers: dict[str, _Numbers]) -> dict[str, _Numbers]:
    """Return the colours and labels of the parameters of one factor or term, in a dictionary by the name of its arrays.

    Args:
        piece: The factor or term.
        numbers: The colours and labels of the parameters of the whole matrix. A parameter keeps its colour and label.
    """
    return {
        name: _Numbers(numbers[whole].colours[index], numbers[whole].names[index])
        for name, (whole, index) in piece.arrays.items()
    }


def _pick(leaf: np.ndarray, place: Int[np.ndarray, "m n"], absent: Any) -> np.ndarray:
    """Return the entries of the flattened `leaf` at the indices `place`, and `absent` where the index is -1."""
    flat = np.concatenate([leaf.reshape(-1, *np.shape(absent)), np.asarray(absent)[None]])
    return flat[place]


def _column(
    label: str, matrix: StructuredMatrix | None, numbers: dict[str, _Numbers], *, strips: bool = True
) -> _Column:
    """Return everything that the picture shows of one matrix.

    Args:
        label: The text below the matrix, in TeX.
        matrix: The matrix. None stands for a dense matrix whose entries are themselves the parameters.
        numbers: The colours and labels of the parameters, by the name of their array. If `matrix` is None, it holds one
            array.
        strips: Whether to draw the arrays of parameters that have two or more dimensions above the matrix.
    """
    if matrix is None:
        (own,) = numbers.values()
        return _Column(label, _Grid(own.colours, own.names), [], None)
    above = [_strip(own) for own in numbers.values() if own.colours.ndim > 1] if strips else []
    found = origins(matrix)
    if found is None:
        values = _dense(matrix)
        most = float(np.max(np.abs(values))) or 1.0
        return _Column(label, _Grid(VALUES(values / most / 2 + 0.5)[..., :3], None), above, most)
    scale, places = found
    colours = np.ones((*scale.shape, 3))
    names = np.full(scale.shape, "", object)
    for name, own in numbers.items():
        colours = colours * _pick(own.colours, places[name], np.ones(3))
        names = names + _pick(own.names.astype(object), places[name], "")
    size = np.minimum(np.abs(scale), 1)[..., None]
    colours = np.where(scale[..., None] < 0, 0.55 * colours, colours) * size + _rgb(EMPTY) * (1 - size)
    ones = np.isclose(np.abs(scale), 1)
    front = np.where(ones, np.where(scale < 0, "-", ""), np.char.mod("%.2g\\,", scale))
    names = np.where(scale == 0, "0", front.astype(object) + names)
    return _Column(label, _Grid(colours, names), above, None)


def _strip(numbers: _Numbers) -> _Grid:
    """Return an array of parameters as a grid, transposed if needed so that its longer axis runs from left to right."""
    colours, names = numbers
    if names.ndim == 2 and names.shape[0] > names.shape[1]:
        colours, names = colours.swapaxes(0, 1), names.T
    rows = 1 if names.ndim == 1 else names.shape[0]
    return _Grid(colours.reshape(rows, -1, 3), names.reshape(rows, -1))


def _dense(matrix: StructuredMatrix) -> Float[np.ndarray, "m n"]:
    return np.asarray(matrix.to_dense(), np.float64)


def _rgb(colour: str) -> Float[np.ndarray, "3"]:
    return np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])


# Layout


def _compose(columns: list[_Column | str], title: str) -> Figure:
    """Return a figure in which matrices are side by side, with symbols such as `+` and `=` between them.

    Args:
        columns: The matrices and, as strings in TeX, the symbols, from left to right.
        title: The title of the figure.
    """
    drawn = [column for column in columns if isinstance(column, _Column)]
    cell = BOX / max(max(column.grid.colours.shape[:2]) for column in drawn)
    widths = [_width(column, cell) for column in columns]
    above = max(sum(_strip_size(strip, cell)[1] + 0.12 for strip in column.strips) for column in drawn)
    tall = max(_size(column.grid, cell)[1] for column in drawn)
    width, below = max(sum(widths) + 2 * MARGIN, 0.085 * len(title) + 2 * MARGIN), 0.62
    height = MARGIN + 0.42 + above + tall + below
    figure = Figure(figsize=(width, height), facecolor="white")
    figure.suptitle(
        title, x=MARGIN / width, y=1 - 0.5 * MARGIN / height, ha="left", va="top", color=INK, size=11, weight="bold"
    )

    def axes(left: float, bottom: float, w: float, h: float) -> Axes:
        return figure.add_axes((left / width, bottom / height, w / width, h / height))

    left = (width - sum(widths)) / 2
    for column, w in zip(columns, widths, strict=True):
        middle = left + w / 2
        if isinstance(column, str):
            figure.text(
                middle / width, (below + tall / 2) / height, column, ha="center", va="center", color=INK, size=17
            )
        else:
            gw, gh = _size(column.grid, cell)
            bottom = below + (tall - gh) / 2
            _paint(axes(middle - gw / 2, bottom, gw, gh), column.grid, gw, gh)
            top = bottom + gh + 0.12
            for strip in reversed(column.strips):
                sw, sh = _strip_size(strip, cell)
                _paint(axes(middle - sw / 2, top, sw, sh), strip, sw, sh)
                top += sh + 0.12
            figure.text(
                middle / width, (bottom - 0.08) / height, column.label, ha="center", va="top", color=INK, size=11
            )
            if column.range is not None:
                _legend(axes(middle - 0.5, bottom - 0.42, 1.0, 0.07), column.range)
        left += w
    return figure


def _width(column: _Column | str, cell: float) -> float:
    if isinstance(column, str):
        return GAP + 0.1 * len(re.sub(r"[\\$]|[a-z]{2,}", "", column))
    return max(_size(column.grid, cell)[0], *(_strip_size(strip, cell)[0] for strip in column.strips), 0.0)


def _size(grid: _Grid, cell: float) -> tuple[float, float]:
    """Return the width and height of a drawn matrix in inches.

    Each entry is a square with a side of `cell` inches. If the matrix would then be too small to see, larger squares
    are used.
    """
    rows, columns = grid.colours.shape[:2]
    cell = max(cell, 0.8 / max(rows, columns))
    return max(columns * cell, 0.12), max(rows * cell, 0.12)


def _strip_size(grid: _Grid, cell: float) -> tuple[float, float]:
    rows, columns = grid.colours.shape[:2]
    return min(max(columns * cell, 0.12), 1.4 * BOX), min(rows * max(min(cell, 0.24), 0.12), 0.6 * BOX)


def _paint(axes: Axes, grid: _Grid, width: float, height: float) -> None:
    rows, columns = grid.colours.shape[:2]
    axes.imshow(np.clip(grid.colours, 0, 1), aspect="auto", interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color=FAINT, linewidth=0.6)
    if max(rows, columns) <= 4 * MOST_LETTERS:
        axes.vlines(np.arange(1, columns) - 0.5, -0.5, rows - 0.5, color="white", linewidth=0.7)
        axes.hlines(np.arange(1, rows) - 0.5, -0.5, columns - 0.5, color="white", linewidth=0.7)
    if grid.names is None or rows * columns > (2 * MOST_LETTERS) ** 2:
        return
    longest = max(len(re.sub(r"[\\{}_,]|alpha", "", name)) for name in grid.names.flat)
    size = min(9.0, 72 * min(width / columns / (0.62 * longest + 0.5), 0.6 * height / rows))
    if size < 6:
        return
    for (i, j), name in np.ndenumerate(grid.names):
        dark = grid.colours[i, j] @ np.array([0.3, 0.59, 0.11]) < 0.5
        axes.text(j, i, f"${name}$", ha="center", va="center", size=size, color="white" if dark else INK)


def _legend(axes: Axes, most: float) -> None:
    """Draw the colour bar for values from -most to most below a matrix that is coloured by value."""
    axes.imshow(np.linspace(0, 1, 128)[None], cmap=VALUES, aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    for x, align, value in ((-0.04, "right", -most), (1.04, "left", most)):
        axes.text(x, 0.5, f"{value:.2g}", ha=align, va="center", transform=axes.transAxes, size=7.5, color=FAINT)
