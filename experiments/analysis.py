"""What fine-tuning did to a network, layer by layer, and which structure its updates have.

    python -m experiments.analysis WORKDIR [--full=WORKDIR_OF_A_FULL_RUN]

looks at a finished run of `launch.py`, of any method and model (section B.4 of arXiv 2406.17740): rank and condition of
every update, beside what theory says of the rank; 1 - cosine similarity of tuned and pretrained weights; and, with
`--full`, the linear CKA of the hidden states of every layer with those of the fully tuned network, on test examples.

    python -m experiments.analysis WORKDIR --energy=full
    python -m experiments.analysis WORKDIR_OR_CONFIG --energy=gradient

answers which structure fits a model and its data: how much of a dense update each family of matrices keeps at equal
budget (`experiments/energy.py`). The update is what full fine-tuning has learned, in a finished run of the method
`full`; or the first gradient of the training loss, for which nothing need be trained: a run's folder or a configuration
such as `configs/bert_glue.py:task=rte` will do.

Writes tables (`.csv`, `.md`) and pictures to `experiments/results/analysis_<name of the run>`, or to `--out`.
"""

import argparse
import csv
import itertools
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import energy
from experiments.cka import linear_cka
from experiments.command import command, load_job
from experiments.updates import LEGEND, Update, block_of, changes, examine, kernels, kind_of, table
from surm_jax.devices.compilation import use_compilation_cache
from surm_jax.devices.mesh import put_batch
from surm_jax.errors import UserError
from surm_jax.peft import Adapter, load_adapter
from surm_jax.record.workdir import read_result, relocated
from surm_jax.training import parse
from surm_jax.training.config import RunConfig, saved_config, to_dict
from surm_jax.training.partition import partition
from surm_jax.training.setup import Job, prepare

RESULTS = Path(__file__).parent / "results"
# Of a head that starts at zero, the norm of its first step.
HEAD_STEP = 1e-3


class Run(NamedTuple):
    """A finished run: how it was made, the pretrained model, and what became of it."""

    job: Job
    base: nnx.Module
    tuned: nnx.Module


def read_run(workdir: Path, overrides: Mapping[str, Any]) -> RunConfig:
    """Returns the configuration of a finished run of one seed.

    Raises:
        UserError: There is no run, it is not complete, or it is one of several seeds.
    """
    config = saved_config(workdir, overrides)
    if len(config.seeds) > 1:
        raise UserError(
            f"{workdir} holds a run for each of {len(config.seeds)} seeds: choose one, such as"
            f" {workdir / f'seed-{config.seeds[0]}'}"
        )
    read_result(workdir)
    return config


def read_full(workdir: Path, overrides: Mapping[str, Any]) -> RunConfig:
    """Returns the configuration of a finished run that trained all parameters.

    Raises:
        UserError: As `read_run`, or it is a run of another method.
    """
    config = read_run(workdir, overrides)
    if config.peft.method != "full":
        raise UserError(
            f"{workdir} holds a run of {config.peft.method}, but a fully tuned network is needed: make one with"
            " --config.peft.method=full, and name it with --full"
        )
    return config


def read_any(where: str, overrides: Mapping[str, Any]) -> RunConfig:
    """Returns the configuration of a run, finished or not, or that of a file such as `configs/digits.py`.

    Raises:
        UserError: There is neither.
    """
    if where.partition(":")[0].endswith(".py"):
        return parse(relocated(to_dict(parse(load_job(where))), overrides))
    return saved_config(Path(where), overrides)


def open_run(config: RunConfig, workdir: Path) -> Run:
    """Loads the models of a run. To be used, as the models are, with the mesh of its job set."""
    job = prepare(config, config.seeds[0])
    with jax.set_mesh(job.mesh):
        base = job.base_model()
        tuned, _ = load_adapter(workdir / "adapter", base, execution=job.config.peft.execution)
    return Run(job, base, tuned)


@partial(jax.jit, static_argnums=0)
def _states(graphdef: nnx.GraphDef, state: nnx.State, batch: dict[str, Array]) -> tuple[Float[Array, "b t d"], ...]:
    model = nnx.merge(graphdef, state)
    if "image" in batch:
        return model.hidden_states(batch["image"])
    return model.hidden_states(batch["tokens"], mask=batch["token_mask"], token_types=batch["token_types"])


def hidden_states(
    job: Job, model: nnx.Module, batches: Iterable[dict[str, np.ndarray]]
) -> list[Float[np.ndarray, "tokens d"]]:
    """Returns what the first block reads, and what each block returns: every token a row, without padding."""
    graphdef, state = nnx.split(model)
    by_layer = []
    with jax.set_mesh(job.mesh):
        for batch in batches:
            states = [np.asarray(one, np.float32) for one in _states(graphdef, state, put_batch(batch, job.mesh))]
            kept = np.broadcast_to(batch["mask"][:, None], states[0].shape[:2]) & batch.get("token_mask", True)
            by_layer.append([one[kept] for one in states])
    return [np.concatenate(parts) for parts in zip(*by_layer, strict=True)]


class Alike(NamedTuple):
    """How alike the states after so many blocks are to those of the fully tuned network: linear CKA."""

    blocks: int
    run: float
    base: float


def compare(run: Run, full: nnx.Module, examples: int) -> list[Alike]:
    """Compares a run and the pretrained model with a fully tuned network.

    On so many test examples or a few more, in whole batches evenly spread over the test set; on all, if it has less.
    """
    batches = run.job.task.eval_batches(run.job.task.tests[0])
    every = max(1, len(batches) // -(-examples // run.job.config.data.eval_batch_size))
    chosen, seen = [], 0
    for place, batch in enumerate(batches):
        if place % every == 0 and seen < examples:
            chosen.append(batch)
            seen += int(batch["mask"].sum())
    wanted = hidden_states(run.job, full, chosen)
    rows = {}
    for name, model in (("run", run.tuned), ("base", run.base)):
        states = hidden_states(run.job, model, chosen)
        pairs = tqdm.tqdm(zip(states, wanted, strict=True), desc=f"CKA, {name}", total=len(wanted), unit="layer")
        rows[name] = [linear_cka(*pair) for pair in pairs]
    return [Alike(blocks, *pair) for blocks, pair in enumerate(zip(rows["run"], rows["base"], strict=True))]


def first_gradient(job: Job, count: int) -> dict[str, Float[np.ndarray, "in out"]]:
    """Returns the gradient of the training loss by every kernel at the start of full fine-tuning, by layer.

    A mean over so many batches, without dropout. To a head that is zero, as a ViT's is at the start, no gradient
    reaches the layers below it: the head then makes its own first step, a small one, and the gradient is the next.
    """
    batches = list(itertools.islice(job.task.train_batches(job.seed), count))
    with jax.set_mesh(job.mesh):
        model = job.base_model()
        head = model.head.kernel
        if not np.any(head[...]):
            (step,) = _mean_gradient(job, model, "head/kernel", batches).values()
            head[...] = -HEAD_STEP * step / jnp.linalg.norm(step)
        gradients = _mean_gradient(job, model, "(?!head/).*/kernel", batches)
    # In the shape of matrices.
    return {path: np.asarray(gradients[f"{path}/kernel"]).reshape(one.shape) for path, one in kernels(model).items()}


def _mean_gradient(
    job: Job, model: nnx.Module, pattern: str, batches: Sequence[dict[str, np.ndarray]]
) -> dict[str, Array]:
    parts, trained, frozen = partition(model, Adapter((), (pattern,)))
    task = job.task

    @jax.jit
    @jax.grad
    def gradient(trained: dict[str, Array], frozen: nnx.State, batch: dict[str, Array]) -> Float[Array, ""]:
        outputs = task.forward(parts.merge(trained, frozen), batch, None)
        return task.objective.loss(outputs, batch["label"], 0.0).mean()

    total = None
    for batch in tqdm.tqdm(batches, desc=f"gradient, {pattern}", unit="batch"):
        new = gradient(trained, frozen, put_batch(batch, job.mesh))
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    return {path: array.astype(jnp.float32) / len(batches) for path, array in total.items()}


def write_rows(path: Path, rows: Sequence[NamedTuple]) -> None:
    """Writes a table, floating-point numbers to six digits."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0]._fields)
        for row in rows:
            writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row])


def alike_table(alike: Sequence[Alike]) -> str:
    """Returns the table of CKA in markdown."""
    lines = ["| states after | this run | pretrained |", "|---|---:|---:|"]
    lines += [f"| {row.blocks} blocks | {row.run:.4f} | {row.base:.4f} |" for row in alike]
    return "\n".join(lines) + "\n"


def draw(updates: Sequence[Update], alike: Sequence[Alike], title: str, path: Path) -> None:
    """Draws rank, norm and 1 - cosine of the updates, and CKA, by block; what is not there is left out."""
    panels = (["rank", "relative_norm", "one_minus_cosine"] if updates else []) + (["cka"] if alike else [])
    figure = Figure(figsize=(0.6 + 3.4 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        if panel == "cka":
            _draw_alike(axes, alike)
        else:
            _draw_updates(axes, updates, panel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if updates:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)


def _draw_updates(axes: Axes, updates: Sequence[Update], column: str) -> None:
    last = max((block_of(row.layer) or 0) for row in updates)
    for kind in dict.fromkeys(kind_of(row.layer) for row in updates):
        mine = [row for row in updates if kind_of(row.layer) == kind]
        # A layer after the blocks, such as a pooler, comes after them.
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


def analyse(workdir: Path, full: Path | None, overrides: Mapping[str, Any], out: Path, command: str, n: int) -> str:
    """Looks at a finished run, writes the tables and the picture, and returns the text."""
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
    alike = compare(run, fully_tuned, n) if full else []
    for suffix in (".csv", ".cka.csv", ".png"):
        # Of an earlier analysis under the same name, which may have had what this one has not.
        _with(out, suffix).unlink(missing_ok=True)
    head = f"{config.peft.method} on {config.data.name}"
    text = [f"# What fine-tuning did: {head}\n", f"`{command}`\n", "## Updates\n"]
    if updates:
        write_rows(_with(out, ".csv"), updates)
        text += [LEGEND, table(updates)]
    else:
        text += [f"There is no weight update: {config.peft.method} leaves the kernels of linear layers as they are.\n"]
    if alike:
        write_rows(_with(out, ".cka.csv"), alike)
        text += ["## CKA with the fully tuned network\n", CKA.format(full=full, examples=n), alike_table(alike)]
    if updates or alike:
        draw(updates, alike, head, _with(out, ".png"))
        text += [f"![by block]({_with(out, '.png').name})\n"]
    return "\n".join(text)


def _data(name: str, classes: Sequence[str]) -> str:
    return f"the classes {', '.join(classes)} of {name}" if classes else name


CKA = """Linear CKA of hidden states with those of the fully tuned network in `{full}`, every
token of {examples} test examples or a few more a row; that of the pretrained network as a yardstick.
"""


def map_energy(
    title: str, source: str, matrices: Mapping[str, Float[np.ndarray, "in out"]], out: Path, command: str
) -> str:
    """Writes the table and the heat maps of the matrices of all layers, and returns the text."""
    maps = energy.energy_maps(matrices)
    energy.write_csv(maps, _with(out, ".csv"))
    energy.draw(maps, f"{title}: energy that each family keeps, %", _with(out, ".png"))
    picture = f"![energy by layer and family]({_with(out, '.png').name})\n"
    return "\n".join([f"# {title}: which structure fits\n", f"`{command}`\n", source, energy.report(maps), picture])


OF_FULL = """The matrices are tuned minus pretrained kernels of the run in `{folder}`.
"""
OF_GRADIENT = """The matrices are the gradients of the training loss by the kernels at the pretrained weights, means
over {count} batches. Where the head starts at zero, as a ViT's does, no gradient reaches the layers below it: they are
then those after a first small step of the head alone.
"""


def name_of(source: str) -> str:
    """Returns what the files of results are named by: a run's folder, of one of several seeds with the run's, or a job.

    >>> name_of("runs/rte"), name_of("runs/rte/seed-1"), name_of("configs/bert_glue.py:task=rte")
    ('rte', 'rte_seed-1', 'bert_glue_task=rte')
    """
    file, _, argument = source.partition(":")
    path = Path(file.removesuffix(".py")).resolve()
    names = [path.parent.name, path.name] if path.name.startswith("seed-") else [path.name]
    return re.sub(r"[^\w.=-]", "_", "_".join(filter(None, [*names, argument])))[:150]


def _with(out: Path, suffix: str) -> Path:
    # Not `with_suffix`: a name may hold a point, as one with a learning rate does.
    return out.parent / (out.name + suffix)


def main(arguments: Sequence[str] | None = None) -> None:
    """Analyses, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workdir", help="folder of a run; with --energy=gradient also a configuration, FILE.py")
    parser.add_argument("--full", type=Path, help="folder of a run of the method full, of the same model and data")
    parser.add_argument("--energy", choices=("full", "gradient"), help="map the energy of this update instead")
    parser.add_argument("--out", type=Path, help="where to, without the suffix of the file's name")
    parser.add_argument("--data", help="where the data set is now, if not where it was")
    parser.add_argument("--model", help="the same of the pretrained weights")
    parser.add_argument("--examples", type=int, default=256, help="test examples for CKA, at least")
    parser.add_argument("--batches", type=int, default=16, help="training batches for the gradient")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    for name in ("examples", "batches"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
    use_compilation_cache()
    workdir = Path(options.workdir)
    given = {"data.dir": options.data, "model.checkpoint": options.model}
    overrides = {key: value for key, value in given.items() if value}
    command = f"python -m experiments.analysis {shlex.join(arguments)}"
    out = options.out or RESULTS / f"analysis_{name_of(options.workdir)}"
    out.parent.mkdir(parents=True, exist_ok=True)
    if not options.energy:
        text = analyse(workdir, options.full, overrides, out, command, options.examples)
    elif options.energy == "full":
        out, folder = _with(out, "_energy_full"), options.full or workdir
        config = read_full(folder, overrides)
        run = open_run(config, folder)
        matrices = {layer: change.added for layer, change in changes(run.base, run.tuned).items()}
        title = f"Update of full fine-tuning on {config.data.name}"
        text = map_energy(title, OF_FULL.format(folder=folder), matrices, out, command)
    else:
        out, config = _with(out, "_energy_gradient"), read_any(options.workdir, overrides)
        matrices = first_gradient(prepare(config, config.seeds[0]), options.batches)
        title = f"First gradient on {config.data.name}"
        text = map_energy(title, OF_GRADIENT.format(count=options.batches), matrices, out, command)
    _with(out, ".md").write_text(text)
    print(text)


if __name__ == "__main__":
    command(main)
