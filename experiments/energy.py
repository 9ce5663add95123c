"""Which structure fits: how much of a matrix's energy the nearest matrix of each family keeps, layer by layer.

The energy is the squared Frobenius norm. Every family gets the same budget, twice the longer side of the matrix (of a
square one the numbers of a LoRA of rank one), and what it keeps is `surm_jax.structured.approximations`. A share means
something only beside that of a matrix without any structure, so the same is done to matrices of independent normal
numbers: a linear family of p numbers keeps p / (in * out) of these, products such as low rank more.
"""

import csv
import inspect
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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from surm_jax.errors import UserError
from surm_jax.structured import FAMILIES, approximations

# Matrices of independent normal numbers for each shape.
DRAWS = 3
GAUSSIAN = "i.i.d. Gaussian"
# In the order of the pictures. Left out: a pair of circulants, which holds the same matrices as one, and a pair of
# general Toeplitz matrices, which has twice the numbers of the budget.
TITLES = {
    "Circulant": "circulant",
    "SkewCirculant": "skew-circulant",
    "FCirculant": "triangular Toeplitz",
    "SymmetricToeplitz": "symmetric Toeplitz",
    "Toeplitz": "Toeplitz",
    "SymmetricToeplitzPair": "sym. Toeplitz pair",
    "LowDisplacementRank": "W(G, H)",
    "BlockCirculant": "block-circulant",
    "Tiled": "tiled",
    "Kronecker": "Kronecker",
    "LowRankKronecker": "low-rank Kronecker",
    "LowRank": "low rank",
}

Shape = tuple[int, int]


class Family(NamedTuple):
    """A family at the size that the budget allows.

    Attributes:
        name: The registered name.
        size: What was chosen, such as "rank 1"; empty where there is one size only.
        parameters: How many numbers it has.
    """

    name: str
    size: str
    parameters: int

    @property
    def searched(self) -> bool:
        """Whether its share is what a search found, so that there may be more; otherwise it is exact."""
        return "steps" in inspect.signature(FAMILIES[self.name].nearest).parameters


class EnergyMap(NamedTuple):
    """What families keep of the energy of matrices of one shape.

    Attributes:
        shape: (in_features, out_features).
        shares: By layer, then by family, from 0 to 1.
        gaussian: By family, the mean over matrices of independent normal numbers.
    """

    shape: Shape
    shares: dict[str, dict[Family, float]]
    gaussian: dict[Family, float]

    @property
    def families(self) -> list[Family]:
        """The families, in the order of the pictures."""
        return sorted(self.gaussian, key=lambda family: list(TITLES).index(family.name))


def shares(matrix: Float[np.ndarray, "in out"]) -> dict[Family, float]:
    """Returns the share of a matrix's energy that each family keeps.

    Raises:
        UserError: The matrix is zero, or holds numbers that are not finite.

    >>> kept = shares(np.roll(np.eye(4, dtype=np.float32), 1, axis=1))  # a circulant
    >>> {family.name: round(share, 4) for family, share in kept.items()}["Circulant"]
    1.0
    """
    norm = np.linalg.norm(matrix)
    if not (np.isfinite(norm) and norm > 0):
        raise UserError("there is no energy to share: the matrix is zero, or holds numbers that are not finite")
    kept = {}
    for name, found in approximations(jnp.asarray(matrix / norm, jnp.float32), 2 * max(matrix.shape)).items():
        if name not in TITLES:
            continue
        size = ", ".join(f"{option} {value}" for option, value in found.options.items() if option != "f")
        kept[Family(name, size, found.matrix.num_params)] = found.energy
    return kept


def energy_maps(matrices: Mapping[str, Float[np.ndarray, "in out"]]) -> list[EnergyMap]:
    """Returns the maps of some layers' matrices, one for each shape. Shows a bar: the searches take their time.

    Raises:
        UserError: A matrix is zero, or holds numbers that are not finite; the message names the layer.
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


def write_csv(maps: Sequence[EnergyMap], path: Path) -> None:
    """Writes a row for every layer and family."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["layer", "in", "out", "family", "size", "parameters", "found", "share", "gaussian"])
        for one in maps:
            for layer, kept in one.shares.items():
                for family in one.families:
                    found = "search" if family.searched else "exact"
                    values = [f"{share:.6f}" for share in (kept[family], one.gaussian[family])]
                    rows.writerow([layer, *one.shape, family.name, family.size, family.parameters, found, *values])


def table(one: EnergyMap) -> str:
    """Returns what each family keeps on average over layers, in markdown."""
    count = len(one.shares)
    lines = [
        f"| family | numbers | found by | mean of {count} layers | least | most | Gaussian | times that | best in |",
        "|---|---:|---|" + "---:|" * 6,
    ]
    best = [max(kept, key=kept.get) for kept in one.shares.values()]
    for family in one.families:
        values = [kept[family] for kept in one.shares.values()]
        mean, gaussian = statistics.mean(values), one.gaussian[family]
        cells = [
            TITLES[family.name] + (f", {family.size}" if family.size else ""),
            f"{family.parameters:,}",
            "search" if family.searched else "formula",
            *(f"{percent(value)} %" for value in (mean, min(values), max(values), gaussian)),
            f"{mean / gaussian:.1f}",
            str(best.count(family)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def percent(share: float) -> str:
    """Returns a share in percent, with a digit or two after the point.

    >>> percent(0.1234), percent(0.00123)
    ('12.3', '0.12')
    """
    return f"{100 * share:.1f}" if share >= 0.01 else f"{100 * share:.2f}"


def draw(maps: Sequence[EnergyMap], title: str, path: Path) -> None:
    """Draws a heat map for each shape, layers by families, with the Gaussian matrices as the last line."""
    rows = [len(one.shares) + 1 for one in maps]
    figure = Figure(figsize=(11.5, 0.7 + sum(1.1 + 0.23 * count for count in rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(maps), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axes, one in zip(panels, maps, strict=True):
        _draw_map(axes, one)
    figure.suptitle(title, fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100)
    # Few colours make a small file, however many layers there are.
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
        "\n".join(filter(None, [textwrap.fill(TITLES[family.name], 13), family.size, f"{family.parameters:,}"]))
        for family in one.families
    ]
    axes.set_xticks(range(len(titles)), titles, fontsize=8)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(lines)), lines, fontsize=8)
    axes.set_ylabel(f"{one.shape[0]} x {one.shape[1]}")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def report(maps: Sequence[EnergyMap]) -> str:
    """Returns the tables of all shapes with what they mean, in markdown."""
    parts = [LEGEND]
    for one in maps:
        parts += [f"## {one.shape[0]} x {one.shape[1]}\n", table(one)]
    return "\n".join(parts)


LEGEND = f"""The share of the squared Frobenius norm that the nearest matrix of each family keeps, at the largest size
that has at most twice as many numbers as the longer side of the matrix. **Gaussian**: of a matrix of independent normal
numbers, mean of {DRAWS}. **Formula**: the optimum; **search**: the best that was found, so there may be more. **Best
in**: how many layers. A share says how near a matrix lies to a family, not how well a network trains within it.
"""
