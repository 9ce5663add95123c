r"""What parts of the method matter: one choice changed at a time, everything else equal.

    python -m experiments.ablations

asks six questions on the embedded digits job: Q, K, V or Q, V; a bias in the adapter or none; the pair of vectors or a
single one; how large its random vector is; two Toeplitz matrices or one; the rank of `W(G, H)`. With a job of your own,

    python -m experiments.ablations --name=cifar --config=configs/vit_cifar.py --steps=1000 --holdout=2000 \\
        --set data.dir=FOLDER_OF_PREPARED_TFDS_SETS

Every variant has the best of three or more learning rates by held-out training examples, and then three other seeds.
Finished runs are rows of `experiments/results/ablations_NAME.csv` and are not made again; `--report` only writes the
table and the picture of the rows that are there.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import grid
from experiments.command import command, load_job, set_values
from experiments.grid import Grid
from experiments.pictures import draw_scores
from experiments.rows import Row, Run, note_settings, read_settings
from surm_jax.errors import UserError
from surm_jax.record.progress import Interruption
from surm_jax.training import parse

RESULTS = grid.RESULTS
RUNS = Path("runs/ablations")
DIGITS = "configs/digits.py"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A method with its settings.

    Attributes:
        method: as `config.peft.method`.
        rates: the learning rates that it chooses from at least.
        settings: of the method.
        target: as `config.peft.target`; empty: what the method is meant for.
    """

    method: str
    rates: tuple[float, ...]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    target: str = ""


MIDDLE, LARGE = (3e-3, 1e-2, 3e-2), (1e-2, 3e-2, 1e-1)
PAIR = Variant("circulant", MIDDLE, {"scale": 0.3})
QUESTIONS: dict[str, dict[str, Variant]] = {
    "Which projections": {
        "circulant, Q K V": PAIR,
        "circulant, Q V": dataclasses.replace(PAIR, target="qv"),
        "LoRA, Q K V": Variant("lora", LARGE),
        "LoRA, Q V": Variant("lora", LARGE, target="qv"),
    },
    "A bias in the adapter": {
        f"{family}{', no bias' if not bias else ''}": Variant(f"{family}_adapter", MIDDLE, {"bias": bias})
        for family in ("circulant", "toeplitz", "kronecker")
        for bias in (True, False)
    },
    "Two vectors or one": {
        "circulant, Q K V": PAIR,
        "single circulant": Variant("structured", MIDDLE, {"family": "circulant"}),
    },
    "How large the random vector is": {
        ("circulant, Q K V" if scale == 0.3 else f"scale {scale:g}"): dataclasses.replace(
            PAIR, settings={"scale": scale}, rates=LARGE if scale < 0.1 else MIDDLE
        )
        for scale in (0.02, 0.1, 0.3, 1.0, 3.0)
    },
    "Two Toeplitz matrices or one": {
        "symmetric pair": Variant("toeplitz", MIDDLE, {"scale": 0.3}),
        "general pair": Variant("toeplitz_asymmetric", MIDDLE, {"scale": 0.3}),
        "one general": Variant("structured", MIDDLE, {"family": "toeplitz"}),
    },
    "The rank of W(G, H)": {
        f"rank {rank}": Variant("low_displacement", MIDDLE, {"rank": rank, "scale": 0.1}) for rank in (1, 2, 4, 8)
    },
}
VARIANTS = {name: variant for variants in QUESTIONS.values() for name, variant in variants.items()}
# What `config_of` sets.
SET_HERE = (
    "seeds",
    "peft.method",
    "peft.target",
    "optim.learning_rate",
    "optim.steps",
    "optim.epochs",
    "data.holdout",
    "log.evaluate_every",
    *(f"peft.{variant.method}.{setting}" for variant in VARIANTS.values() for setting in variant.settings),
)


def config_of(run: Run, options: argparse.Namespace) -> ml_collections.ConfigDict:
    """Returns the configuration of a run.

    Raises:
        UserError: for a missing file, or a key or value of `--set` that cannot be.
    """
    config, variant = load_job(options.config), VARIANTS[run.method]
    set_values(config, options.set, SET_HERE)
    config.seeds, config.peft.method, config.peft.target = (run.seed,), variant.method, variant.target
    config.peft[variant.method].update(variant.settings)
    config.optim.steps, config.optim.epochs = options.steps, 0.0
    config.optim.learning_rate[variant.method] = run.learning_rate
    config.log.evaluate_every = 0
    if run.part == "search":
        config.data.holdout = options.holdout
    return config


def report(whole: Grid, rows: Sequence[Row], path: Path, settings: Mapping[str, Any]) -> None:
    """Writes a table for every question, and the picture."""
    job = f"`{settings['config']}`" + "".join(f", {text}" for text in settings["set"])
    parts = [
        f"""# Ablations: {path.stem.removeprefix("ablations_")}

`python -m experiments.ablations`: the job {job}; {settings["steps"]:,} steps; {len(whole.seeds)} seeds, mean ± standard
deviation on the test set, in percent; `trained` counts the head too. Empty: not measured yet. Every run is in
`{path.name}`. Differences of the size of the deviations are noise. Learning rates: see the end.
"""
    ]
    for question, variants in QUESTIONS.items():
        part = dataclasses.replace(whole, rates={name: whole.rates[name] for name in variants})
        parts.append(f"## {question}\n\n{part.table(rows, mean=False)}")
    parts.append(f"![scores by question]({path.stem}.png)\n")
    legend = "*: at an end of what was tried. -: all gave the same score."
    parts.append(f"## Learning rates\n\n{settings['holdout']} held out. {legend}\n\n{whole.rates_table(rows)}")
    path.with_suffix(".md").write_text("\n".join(parts))
    draw(whole, rows, path.with_suffix(".png"))


def draw(whole: Grid, rows: Sequence[Row], path: Path) -> None:
    """Draws every question as a panel: a dot for every seed, a bar for their mean."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3, sharex=True).flat
    (task,) = whole.tasks
    for axes, (question, variants) in zip(panels, QUESTIONS.items(), strict=True):
        draw_scores(axes, whole, rows, task, variants)
        axes.set_title(question, fontsize=10)
        axes.tick_params("y", labelsize=8)
    figure.supxlabel(f"{whole.metrics(rows).get(task, 'score')} on the test set, %", fontsize=10)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes what is missing of the grid."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--name", default="digits", help="of the files of the results")
    parser.add_argument("--config", default=DIGITS, help="a job of configs/, or one of your own")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="values of its keys")
    parser.add_argument("--steps", type=int, default=500, help="of every run")
    parser.add_argument("--holdout", type=int, default=150, help="training examples that rates are chosen by")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="only these")
    parser.add_argument("--report", action="store_true", help="only write the tables and the picture")
    options = parser.parse_args(arguments)
    if options.holdout < 1:
        raise UserError(f"--holdout must be at least 1, for the learning rates are chosen by it, got {options.holdout}")
    path = RESULTS / f"ablations_{options.name}.csv"
    whole = Grid((options.name,), {name: variant.rates for name, variant in VARIANTS.items()}, (0, 1, 2))
    part = dataclasses.replace(whole, rates={name: whole.rates[name] for name in options.variants})
    if not options.report:
        set_values(load_job(options.config), options.set, SET_HERE)
        note_settings(path, {name: getattr(options, name) for name in ("config", "set", "steps", "holdout")})
    settings = read_settings(path)

    def make(run: Run, interruption: Interruption) -> Row:
        return grid.measure(run, parse(config_of(run, options)), RUNS, interruption)

    grid.work(part, path, make, lambda rows: report(whole, rows, path, settings), only_report=options.report)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    command(main)
