"""Measure which family of structured matrices approximates the dense matrix of each layer best.

The energy of a matrix is its squared Frobenius norm. The measure is the share of this energy that the nearest matrix of
a family keeps. `surm_jax.structured.approximations` finds the nearest matrices. All families have the same limit on the
number of parameters: twice the longer side of the matrix. For a square matrix this is the number of parameters of a
LoRA of rank one.

For comparison, matrices without any structure are measured too. Their entries are independent Gaussian numbers. If a
family is a linear space with p parameters, it keeps on average the share p / (in * out) of the energy of such an in x
out matrix. A family of products, such as the low-rank matrices, keeps more.
"""

import io
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from PIL import Image

from experiments.tables import markdown, new_figure, write_csv
from surm_jax.errors import UserError
from surm_jax.structured import FAMILIES, approximations

# The number of random Gaussian matrices that are measured for each shape.
DRAWS = 3
GAUSSIAN = "i.i.d. Gaussian"
# A product of two circulants is a circulant. So `CirculantPair` contains the same matrices as `Circulant`, and needs no
# column of its own.
LEFT_OUT = {"CirculantPair"}

Shape = tuple[int, int]


class Family(NamedTuple):
    """A family of structured matrices, at the largest size that the allowed number of parameters permits.

    Attributes:
        name: The name of the family's class, a key of `FAMILIES`.
        size: The size that was chosen, such as "rank 1". It is empty if the family has a single size.
        parameters: The number of parameters of a matrix of this family and size.
    """

    name: str
    size: str
    parameters: int

    @property
    def searched(self) -> bool:
        """Whether the nearest matrix is found by a search.

        A search may miss it, so that the share of energy is too small. Otherwise the share is exact.
        """
        return FAMILIES[self.name].searches


class EnergyMap(NamedTuple):
    """The share of energy that each family keeps, for all layers with matrices of one shape.

    Attributes:
        shape: The shape of the matrices, (in_features, out_features).
        shares: The share of energy, from 0 to 1, by the path of the layer and then by family.
        gaussian: For each family, the mean share of energy over random Gaussian matrices of this shape.
    """

    shape: Shape
    shares: dict[str, dict[Family, float]]
    gaussian: dict[Family, float]

    @property
    def families(self) -> list[Family]:
        """The families in this map, in the order of `FAMILIES`."""
        return sorted(self.gaussian, key=lambda family: list(FAMILIES).index(family.name))


def title_of(name: str) -> str:
    """Return the title of a family in tables and pictures.

    The title is that of a random 8 x 8 matrix of the family, whose options are chosen as in `approximations`.
    """
    family, shape = FAMILIES[name], (8, 8)
    return family.random(shape, **(family.options_within(shape, 64) or {})).title


def shares(matrix: Float[np.ndarray, "in out"]) -> dict[Family, float]:
    """Return the share of a matrix's energy that the nearest matrix of each family keeps, from 0 to 1.

    Raises:
        UserError: The matrix is zero, or it holds numbers that are not finite.
    """
    norm = np.linalg.norm(matrix)
    if not (np.isfinite(norm) and norm > 0):
        raise UserError("there is no energy to share: the matrix is zero, or holds numbers that are not finite")
    kept = {}
    for name, found in approximations(jnp.asarray(matrix / norm, jnp.float32), 2 * max(matrix.shape)).items():
        if name in LEFT_OUT:
            continue
        size = ", ".join(f"{option} {value}" for option, value in found.options.items() if option != "f")
        kept[Family(name, size, found.matrix.num_params)] = found.energy
    return kept


def energy_maps(matrices: Mapping[str, Float[np.ndarray, "in out"]]) -> list[EnergyMap]:
    """Measure the shares of energy for given matrices, with a progress bar. Return a map for each shape.

    Args:
        matrices: The matrix of each layer, by the path of the layer.

    Raises:
        UserError: A matrix is zero, or it holds values that are not finite. The message names the layer.
    """
    by_shape: dict[Shape, dict[str, np.ndarray]] = {}
    for layer, matrix in matrices.items():
        by_shape.setdefault(matrix.shape, {})[layer] = matrix
    maps = []
    with tqdm.tqdm(total=len(matrices) + DRAWS * len(by_shape), desc="energy", unit="matrix") as bar:
        for shape, layers in by_shape.items():
            found = {}
            for layer, matrix in layers.items():
                bar.set_postfix_str(layer)
                try:
                    found[layer] = shares(matrix)
                except UserError as error:
                    raise UserError(f"{layer}: {error}") from None
                bar.update()
            bar.set_postfix_str(GAUSSIAN)
            draws = []
            for seed in range(DRAWS):
                draws.append(shares(np.random.default_rng(seed).normal(size=shape)))
                bar.update()
            mean = {family: statistics.mean(draw[family] for draw in draws) for family in draws[0]}
            maps.append(EnergyMap(shape, found, mean))
    return maps


def write_maps(maps: Sequence[EnergyMap], path: Path) -> None:
    """Write the shares of energy to a csv file, with a row for every pair of a layer and a family."""
    rows = []
    for one in maps:
        for layer, kept in one.shares.items():
            for family in one.families:
                found = "search" if family.searched else "exact"
                values = [f"{share:.6f}" for share in (kept[family], one.gaussian[family])]
                rows.append([layer, *one.shape, family.name, family.size, family.parameters, found, *values])
    write_csv(path, ("layer", "in", "out", "family", "size", "parameters", "found", "share", "gaussian"), rows)


def energy_tables(rows: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return a markdown table for each shape, which shows the share of energy that each family keeps.

    Shares are summarised over all layers of the shape by their mean, minimum and maximum.

    Args:
        rows: The rows of a csv file that `write_maps` wrote.
    """
    shapes: dict[str, dict[tuple[str, str], list[Mapping[str, str]]]] = {}
    for row in rows:
        of_shape = shapes.setdefault(f"{row['in']} x {row['out']}", {})
        of_shape.setdefault((row["family"], row["size"]), []).append(row)
    return {shape: _table(families) for shape, families in shapes.items()}


def _table(families: Mapping[tuple[str, str], Sequence[Mapping[str, str]]]) -> str:
    shares = {family: np.array([float(row["share"]) for row in mine]) for family, mine in families.items()}
    best, lines = np.argmax(np.stack(list(shares.values())), axis=0).tolist(), []
    for place, ((name, size), mine) in enumerate(families.items()):
        kept, gaussian = shares[name, size], float(mine[0]["gaussian"])
        values = {f"mean of {len(kept)} layers": kept.mean(), "least": kept.min(), "most": kept.max()}
        lines.append(
            {
                "family": title_of(name) + (f", {size}" if size else ""),
                "numbers": int(mine[0]["parameters"]),
                "found by": "search" if mine[0]["found"] == "search" else "formula",
                **{title: f"{percent(value)} %" for title, value in (values | {"Gaussian": gaussian}).items()},
                "times that": kept.mean() / gaussian,
                "best in": best.count(place),
            }
        )
    texts = dict.fromkeys((*values, "Gaussian"), ">")
    return markdown(
        lines, {"family": "", "numbers": ",", "found by": ""} | texts | {"times that": ".1f", "best in": "d"}
    )


def percent(share: float) -> str:
    """Return a share in percent: with one digit after the decimal point, or two if it is below 1 %.

    >>> percent(0.1234), percent(0.00123)
    ('12.3', '0.12')
    """
    return f"{100 * share:.1f}" if share >= 0.01 else f"{100 * share:.2f}"


def draw(maps: Sequence[EnergyMap], title: str, path: Path) -> None:
    """Draw a heat map of the shares of energy for each shape, with a row for each layer and a column for each family.

    The last row shows the mean shares over random Gaussian matrices.
    """
    rows = [len(one.shares) + 1 for one in maps]
    figure = new_figure(11.5, 0.7 + sum(1.1 + 0.23 * count for count in rows))
    panels = figure.subplots(len(maps), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axes, one in zip(panels, maps, strict=True):
        _draw_map(axes, one)
    figure.suptitle(title, fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100)
    # A palette of 256 colours keeps the file small even with many layers.
    Image.open(picture).convert("RGB").quantize(256).save(path, optimize=True)


def _draw_map(axes: Axes, one: EnergyMap) -> None:
    lines = {**one.shares, GAUSSIAN: one.gaussian}
    values = np.array([[kept[family] for family in one.families] for kept in lines.values()])
    axes.imshow(values, cmap=colormaps["Blues"], vmin=0, vmax=values.max(), aspect="auto")
    for row, kept in enumerate(values):
        for column, share in enumerate(kept):
            colour = "white" if share > 0.6 * values.max() else "black"
            weight = "bold" if share == kept.max() and row < len(one.shares) else "normal"
            axes.text(column, row, percent(share), ha="center", va="center", size=8, color=colour, weight=weight)
    axes.axhline(len(one.shares) - 0.5, color="black", lw=1)
    titles = [
        "\n".join(filter(None, [textwrap.fill(title_of(family.name), 13), family.size, f"{family.parameters:,}"]))
        for family in one.families
    ]
    axes.set_xticks(range(len(titles)), titles, fontsize=8)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(lines)), lines, fontsize=8)
    axes.set_ylabel(f"{one.shape[0]} x {one.shape[1]}")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
