"""The picture of a run, `curves.png`: its loss and its main metric over the steps, and its largest update."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from surm_jax.atomic import replacing
from surm_jax.peft import KernelPart, iter_parts, kernel_change
from surm_jax.record.metrics import read_metrics

CURVES_NAME = "curves.png"


def draw_curves(folder: Path, model: nnx.Module, metric: str) -> None:
    """Draw the loss and the main metric of a run over its steps, to `curves.png` in its folder.

    If the adapter has updates of kernels, the picture also shows the largest of them (by its norm) as a matrix.

    Args:
        folder: The folder of the run, which holds `metrics.jsonl`.
        model: The adapted model.
        metric: The name of the main metric, such as "accuracy".
    """
    lines = list(read_metrics(folder))
    largest = _largest_update(model)
    figure = Figure(figsize=(12 if largest else 8.5, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    loss, measured, *rest = figure.subplots(1, 3 if largest else 2)
    _draw_curve(loss, lines, "loss")
    _draw_curve(measured, lines, metric)
    if largest is not None:
        (axes,), (path, update) = rest, largest
        reach = np.abs(update).max()
        image = axes.imshow(update, cmap="RdBu", vmin=-reach, vmax=reach, interpolation="nearest")
        figure.colorbar(image, ax=axes, fraction=0.046)
        axes.set_title(f"update of {path}", fontsize=9)
        axes.set_xlabel("output feature")
        axes.set_ylabel("input feature")
    with replacing(folder / CURVES_NAME) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _largest_update(model: nnx.Module) -> tuple[str, np.ndarray] | None:
    """Return the kernel update with the largest norm, as its path and a dense matrix. Return None if there is none."""
    # Keep only the largest update, so that at most two dense matrices exist at the same time.
    largest, norm = None, -1.0
    for row in iter_parts(model):
        if not isinstance(row.part, KernelPart):
            continue
        change = np.asarray(kernel_change(row))
        for update in change.reshape(-1, *change.shape[-2:]):
            if np.linalg.norm(update) > norm:
                largest, norm = (row.path, update), float(np.linalg.norm(update))
    return largest


def _draw_curve(axes: Axes, lines: Sequence[Mapping[str, Any]], quantity: str) -> None:
    ending = f"_{quantity}"
    for name in dict.fromkeys(name for line in lines for name in line if name.endswith(ending)):
        points = [(line["step"], line[name]) for line in lines if name in line]
        label = name.removesuffix(ending)
        axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 20 else None, ms=4, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(quantity)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
