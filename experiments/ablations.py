r"""Measure which parts of a method matter: change one choice at a time, and leave everything else equal.

    python -m experiments.ablations

This command fine-tunes the small ViT of `configs/digits.py` and answers six questions (`QUESTIONS`). Should an update
be added to the kernels of Q, K and V, or only to those of Q and V? Does an adapter need a bias? The vector of a
circulant update is the elementwise product of two trained vectors: are they better than a single one? One of the two
starts at random values and the other at zero: how large should the random values be? Is an update better if it is the
product of two Toeplitz matrices than if it is one Toeplitz matrix? Which rank should `W(G, H)`, an update of low
displacement rank, have? The same questions can be asked for another model and data set:

    python -m experiments.ablations --name=cifar --config=configs/vit_cifar.py --steps=1000 --holdout=2000 \\
        --set data.dir=FOLDER_OF_PREPARED_TFDS_SETS

All runs form a grid (`experiments/grid.py`), in which each variant of a method counts as a method of its own. Finished
runs are the rows of `experiments/results/ablations_NAME.csv`. With `--report` the command starts no run. It shows the
tables and the picture of the runs that are finished.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from experiments import grid
from experiments.command import command, load_job, set_values
from experiments.grid import Grid
from experiments.rows import Row, Run, note_settings, read_rows, read_settings
from experiments.tables import draw_scores, new_figure, rate_table, score_table
from surm_jax.errors import UserError
from surm_jax.training import parse

RESULTS = grid.RESULTS
RUNS = Path("runs/ablations")
DIGITS = "configs/digits.py"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A method together with the settings in which it differs from the method's defaults.

    Attributes:
        method: The name of the method, the value of `config.peft.method`.
        rates: The learning rates that the search for the best learning rate begins with.
        settings: The settings of the method that differ from its defaults, by name.
        target: The value of `config.peft.target`, which names the modules to adapt. Empty means the method's default
            modules.
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
        "single circulant": Variant("structured", MIDDLE, {"family": "Circulant"}),
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
        "one general": Variant("structured", MIDDLE, {"family": "Toeplitz"}),
    },
    "The rank of W(G, H)": {
        f"rank {rank}": Variant("low_displacement", MIDDLE, {"rank": rank, "scale": 0.1}) for rank in (1, 2, 4, 8)
    },
}
VARIANTS = {name: variant for variants in QUESTIONS.values() for name, variant in variants.items()}
# The keys of the configuration that `config_of` sets. The option `--set` must not change them.
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


def whole_grid(name: str) -> Grid:
    """Return the grid of all variants, whose final runs use three seeds.

    Args:
        name: The value of `--name`, which becomes the name of the only task.
    """
    return Grid((name,), {variant: one.rates for variant, one in VARIANTS.items()}, (0, 1, 2))


def config_of(run: Run, options: argparse.Namespace) -> ml_collections.ConfigDict:
    """Return the training configuration of one run of the grid.

    Args:
        run: The run. Its method is a key of `VARIANTS`.
        options: The parsed command line.

    Raises:
        UserError: The file of `--config` does not exist, or a value of `--set` is wrong.
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


def tables(name: str = "digits") -> dict[str, str]:
    """Return a table of test scores for each question, and a table of learning rates, in markdown.

    Args:
        name: The value of `--name` that the rows were made with.
    """
    whole, rows, found = whole_grid(name), read_rows(RESULTS / f"ablations_{name}.csv"), {}
    for question, variants in QUESTIONS.items():
        part = dataclasses.replace(whole, rates={variant: whole.rates[variant] for variant in variants})
        found[question] = score_table(part, rows, mean=False)
    return found | {"rates": rate_table(whole, rows)}


def draw(whole: Grid, rows: Sequence[Row], path: Path) -> None:
    """Draw the test scores of all variants, in a panel for each question."""
    figure = new_figure(11, 5.2)
    panels = figure.subplots(2, 3, sharex=True).flat
    (task,) = whole.tasks
    for axes, (question, variants) in zip(panels, QUESTIONS.items(), strict=True):
        draw_scores(axes, whole, rows, task, variants)
        axes.set_title(question, fontsize=10)
        axes.tick_params("y", labelsize=8)
    figure.supxlabel(f"{whole.metrics(rows).get(task, 'score')} on the test set, %", fontsize=10)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Do all runs of the grid that are not finished yet, and show the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--name", default="digits", help="name of the job in the files of results")
    parser.add_argument("--config", default=DIGITS, help="a job of configs/, or one of your own")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="values of its keys")
    parser.add_argument("--steps", type=int, default=500, help="steps of every run")
    parser.add_argument("--holdout", type=int, default=150, help="training examples held out in searches")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="only these")
    parser.add_argument("--report", action="store_true", help="start no run, only report")
    options = parser.parse_args(arguments)
    if options.holdout < 1:
        raise UserError(f"--holdout must be at least 1, since searches are scored on it, got {options.holdout}")
    path, whole = RESULTS / f"ablations_{options.name}.csv", whole_grid(options.name)
    if options.report:
        read_settings(path)
    else:
        set_values(load_job(options.config), options.set, SET_HERE)
        note_settings(path, {name: getattr(options, name) for name in ("config", "set", "steps", "holdout")})
        part = dataclasses.replace(whole, rates={name: whole.rates[name] for name in options.variants})
        grid.work(part, path, lambda run: parse(config_of(run, options)), RUNS)
    draw(whole, read_rows(path), path.with_suffix(".png"))
    print("\n\n".join(f"{title}\n\n{table}" for title, table in tables(options.name).items()))


if __name__ == "__main__":
    command(main)
