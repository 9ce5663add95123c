"""Measure how fine-tuning changed each layer of a network, or which matrix structure suits its updates.

    python -m experiments.analysis WORKDIR [--full=WORKDIR_OF_A_FULL_RUN]

This command measures a finished run of `launch.py`, of any method and model, as in section B.4 of arXiv 2406.17740. For
every kernel that was changed, it computes the rank and the condition number of the change, the rank that theory
predicts from the structure of the change, and one minus the cosine similarity of the fine-tuned and the pretrained
kernel. With `--full` it also compares the hidden states of every block with those of a fully fine-tuned network, by
their linear CKA on test examples.

    python -m experiments.analysis WORKDIR --energy=full
    python -m experiments.analysis WORKDIR_OR_CONFIG --energy=gradient

These commands show which family of structured matrices suits a model and its data. They take a dense update of each
kernel, and measure how much of its energy (its squared Frobenius norm) the nearest matrix of each family keeps when all
families have the same number of parameters (`experiments/energy.py`). With `full` the updates are those that full
fine-tuning learned, in a finished run of the method `full`. With `gradient` they are the first gradient of the training
loss. A gradient needs no training, so the argument may also be a configuration such as `configs/bert_glue.py:task=rte`.

The tables are printed, and written as csv files together with pictures. The names of the files begin with
`experiments/results/analysis_NAME_OF_THE_RUN`, or with the value of `--out`.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from experiments import energy
from experiments.cka import Alike, alike_table, compare
from experiments.command import command
from experiments.grid import RESULTS
from experiments.runs import first_gradient, open_run, read_any, read_full, read_run
from experiments.tables import new_figure, read_csv, tidy, write_csv
from experiments.updates import Update, block_of, changes, examine, kind_of, update_table
from surm_jax.devices.compilation import use_compilation_cache
from surm_jax.errors import UserError
from surm_jax.peft import load_adapter
from surm_jax.training.setup import prepare


def tables(name: str | Path) -> dict[str, str]:
    """Return the markdown tables of an earlier analysis.

    If it measured the changes of kernels, the table "updates" shows them, and "cka" shows the similarity of hidden
    states. If it measured the energy that families keep, there is a table for each shape of kernel.

    Args:
        name: The path that the names of all files begin with. A string NAME means `experiments/results/analysis_NAME`.
    """
    out = name if isinstance(name, Path) else RESULTS / f"analysis_{name}"
    found = {}
    if _with_suffix(out, ".csv").is_file():
        rows = read_csv(_with_suffix(out, ".csv"))
        found |= energy.energy_tables(rows) if "share" in rows[0] else {"updates": update_table(rows)}
    if _with_suffix(out, ".cka.csv").is_file():
        found["cka"] = alike_table(read_csv(_with_suffix(out, ".cka.csv")))
    return found


def draw(updates: Sequence[Update], alike: Sequence[Alike], title: str, path: Path) -> None:
    """Draw the results of `analyse`, with the number of the block on the horizontal axis.

    Three panels show the rank, the relative norm, and one minus the cosine similarity of the changes of kernels. A
    fourth panel shows the CKA. Panels without data are left out.
    """
    panels = (["rank", "relative_norm", "one_minus_cosine"] if updates else []) + (["cka"] if alike else [])
    figure = new_figure(0.6 + 3.4 * len(panels), 3.6)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        if panel == "cka":
            _draw_alike(axes, alike)
        else:
            _draw_updates(axes, updates, panel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes)
    if updates:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)


def _draw_updates(axes: Axes, updates: Sequence[Update], column: str) -> None:
    last = max((block_of(row.layer) or 0) for row in updates)
    for kind in dict.fromkeys(kind_of(row.layer) for row in updates):
        mine = [row for row in updates if kind_of(row.layer) == kind]
        # A layer outside the blocks, such as a pooler, is drawn to the right of the last block.
        blocks = [last + 1 if block_of(row.layer) is None else block_of(row.layer) for row in mine]
        (line,) = axes.plot(blocks, [getattr(row, column) for row in mine], "o-", ms=4, lw=1.5, label=kind)
        if column == "rank":
            stable = [row.stable_rank for row in mine]
            axes.plot(blocks, stable, "o:", ms=4, lw=1, mfc="white", color=line.get_color())
    titles = {"rank": "rank (open: stable rank)", "relative_norm": "norm, of the kernel's"}
    axes.set_title(titles.get(column, "1 - cosine, tuned and pretrained"), fontsize=10)
    axes.set_xlabel("block")
    axes.set_ylim(bottom=0)


def _draw_alike(axes: Axes, alike: Sequence[Alike]) -> None:
    blocks = [row.blocks for row in alike]
    axes.plot(blocks, [row.run for row in alike], "o-", ms=4, color="black", label="this run")
    axes.plot(blocks, [row.base for row in alike], "o--", ms=4, mfc="white", color="grey", label="pretrained")
    axes.set_title("CKA with the fully tuned network", fontsize=10)
    axes.set_xlabel("after so many blocks")
    axes.legend(frameon=False, fontsize=9)


def analyse(workdir: Path, full: Path | None, overrides: Mapping[str, Any], out: Path, examples: int) -> None:
    """Measure the changes of kernels in a finished run, and write csv files and a picture.

    Args:
        workdir: The folder of the run.
        full: The folder of a run of full fine-tuning, whose hidden states are compared with those of the first run.
            None means no comparison.
        overrides: New values of configuration keys such as `data.dir`, as in `saved_config`.
        out: The path that the names of all written files begin with.
        examples: The smallest number of test examples that CKA is computed from, as in `compare`.

    Raises:
        UserError: A run does not exist or is not complete, or the two runs differ in their model or data.
    """
    config = read_run(workdir, overrides)
    if full:
        theirs = read_full(full, {})
        data, theirs = ((one.data.name, one.data.classes) for one in (config, theirs))
        if theirs != data:
            raise UserError(f"{full} was trained on {_data(*theirs)}, but {workdir} on {_data(*data)}")
    run = open_run(config, workdir)
    if full:
        try:
            fully_tuned, _ = load_adapter(full / "adapter", run.base)
        except UserError as error:
            raise UserError(f"{full} and {workdir} are not of the same model: {error}") from None
    found = tqdm.tqdm(changes(run.base, run.tuned).items(), desc="updates", unit="layer")
    updates = [examine(layer, change) for layer, change in found]
    alike = compare(run, fully_tuned, examples) if full else []
    for suffix in (".csv", ".cka.csv", ".png"):
        # Remove the files of an earlier analysis with this name, since this analysis may not write all of them.
        _with_suffix(out, suffix).unlink(missing_ok=True)
    if updates:
        write_csv(_with_suffix(out, ".csv"), Update._fields, updates)
    else:
        print(f"There is no weight update: {config.peft.method} leaves the kernels of linear layers as they are.")
    if alike:
        write_csv(_with_suffix(out, ".cka.csv"), Alike._fields, alike)
    if updates or alike:
        draw(updates, alike, f"{config.peft.method} on {config.data.name}", _with_suffix(out, ".png"))


def _data(name: str, classes: Sequence[str]) -> str:
    return f"the classes {', '.join(classes)} of {name}" if classes else name


def map_energy(title: str, matrices: Mapping[str, Float[np.ndarray, "in out"]], out: Path) -> None:
    """Write a csv file and heat maps that show which families of structured matrices approximate given matrices best.

    Args:
        title: The beginning of the picture's title.
        matrices: The matrices, by the path of their layer.
        out: The path that the names of all written files begin with.
    """
    maps = energy.energy_maps(matrices)
    energy.write_maps(maps, _with_suffix(out, ".csv"))
    energy.draw(maps, f"{title}: energy that each family keeps, %", _with_suffix(out, ".png"))


def name_of(source: str) -> str:
    """Return a name for files of results, made from the first argument of the command line.

    Args:
        source: The folder of a run, a folder `seed-N` inside the folder of a run, or a configuration file.

    >>> name_of("runs/rte"), name_of("runs/rte/seed-1"), name_of("configs/bert_glue.py:task=rte")
    ('rte', 'rte_seed-1', 'bert_glue_task=rte')
    """
    file, _, argument = source.partition(":")
    path = Path(file.removesuffix(".py")).resolve()
    names = [path.parent.name, path.name] if path.name.startswith("seed-") else [path.name]
    return re.sub(r"[^\w.=-]", "_", "_".join(filter(None, [*names, argument])))[:150]


def _with_suffix(out: Path, suffix: str) -> Path:
    # `Path.with_suffix` would cut off the end of a name that contains a dot, such as `run-0.01`.
    return out.parent / (out.name + suffix)


def main(arguments: Sequence[str] | None = None) -> None:
    """Analyse the run or the configuration given on the command line, write the files, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workdir", help="folder of a run; with --energy=gradient also a configuration, FILE.py")
    parser.add_argument("--full", type=Path, help="folder of a run of the method full, of the same model and data")
    parser.add_argument("--energy", choices=("full", "gradient"), help="map the energy of this update instead")
    parser.add_argument("--out", type=Path, help="where to write, without the suffix of the file's name")
    parser.add_argument("--data", help="where the data set is now, if it was moved")
    parser.add_argument("--model", help="where the pretrained weights are now, if they were moved")
    parser.add_argument("--examples", type=int, default=256, help="minimum number of test examples for CKA")
    parser.add_argument("--batches", type=int, default=16, help="training batches for the gradient")
    options = parser.parse_args(arguments)
    for name in ("examples", "batches"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
    use_compilation_cache()
    workdir = Path(options.workdir)
    given = {"data.dir": options.data, "model.checkpoint": options.model}
    overrides = {key: value for key, value in given.items() if value}
    out = options.out or RESULTS / f"analysis_{name_of(options.workdir)}"
    out.parent.mkdir(parents=True, exist_ok=True)
    if not options.energy:
        analyse(workdir, options.full, overrides, out, options.examples)
    elif options.energy == "full":
        out, folder = _with_suffix(out, "_energy_full"), options.full or workdir
        config = read_full(folder, overrides)
        run = open_run(config, folder)
        matrices = {layer: change.added for layer, change in changes(run.base, run.tuned).items()}
        map_energy(f"Update of full fine-tuning on {config.data.name}", matrices, out)
    else:
        out, config = _with_suffix(out, "_energy_gradient"), read_any(options.workdir, overrides)
        matrices = first_gradient(prepare(config, config.seeds[0]), options.batches)
        map_energy(f"First gradient on {config.data.name}", matrices, out)
    print("\n\n".join(f"{title}\n\n{table}" for title, table in tables(out).items()))


if __name__ == "__main__":
    command(main)
