"""Parts that the grids on images share: options, methods with their learning rates, settings and configurations."""

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import grid, pretrain_cifar
from experiments.grid import Grid
from experiments.rows import Run, note_settings
from surm_jax import data
from surm_jax.errors import UserError, did_you_mean
from surm_jax.peft import METHODS
from surm_jax.training import base_config, parse
from surm_jax.training.config import RunConfig

# The learning rates that the search of each method begins with, chosen by first tries: 100 steps on 2,000 images, with
# a model that `pretrain_cifar` made in four passes. The methods from lora to circulant_adapter train equally many
# parameters.
RATES = {
    "linear_probe": (1e-2, 3e-2, 1e-1),
    "lora": (3e-3, 1e-2, 3e-2),
    "circulant": (1e-3, 3e-3, 1e-2),
    "toeplitz": (1e-3, 3e-3, 1e-2),
    "kronecker": (3e-3, 1e-2, 3e-2),
    "circulant_adapter": (3e-3, 1e-2, 3e-2),
    "bottleneck": (1e-3, 3e-3, 1e-2),
    "full": (3e-4, 1e-3, 3e-3),
}
MOST_HELD_OUT = 2000

Settings = dict[str, Any]


class Source(NamedTuple):
    """The data of a task: the name of the set, and the number of training examples to use, including held-out ones."""

    name: str
    examples: int


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all grids on images have."""
    parser.add_argument("--data", default="", help="folder of prepared TFDS sets")
    parser.add_argument("--sets", nargs="+", default=[], help="as config.data.name; default: five classes of CIFAR-10")
    parser.add_argument("--name", default="cifar", help="name of the grid in the files of results")
    parser.add_argument("--model", default="", help="as config.model.checkpoint; default: the model of pretrain_cifar")
    parser.add_argument("--variant", default="", help="as config.model.variant; default: what the weights say")
    parser.add_argument("--classes", nargs="+", default=[], help="only these classes")
    parser.add_argument("--methods", nargs="+", default=list(RATES), help="any of docs/methods.md")
    parser.add_argument("--rates", nargs="+", default=[], metavar="METHOD=RATE,RATE", help="learning rates to try")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--augment", default="crop_flip", help="as config.data.augment")
    parser.add_argument("--report", action="store_true", help="start no run, only report")


def classes_of(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the classes to keep; empty means all. The default is what `pretrain_cifar` left out of CIFAR-10.

    Raises:
        UserError: CIFAR-10, which gives the names of the default classes, does not exist.
    """
    if options.classes or options.sets:
        return tuple(options.classes)
    return pretrain_cifar.classes_of(pretrain_cifar.OTHERS, options.data)


def count_images(name: str, options: argparse.Namespace) -> int:
    """Return the number of training images of a set, in the classes to keep.

    Raises:
        UserError: The set does not exist, lacks one of the classes, or holds texts.
    """
    dataset = data.load(name, options.data or None)
    if isinstance(dataset, data.TextDataset):
        raise UserError(f"{name} is a set of sentences, and this grid needs images")
    classes = classes_of(options)
    return len((data.keep_classes(dataset, classes) if classes else dataset).train)


def rates_of(options: argparse.Namespace) -> dict[str, tuple[float, ...]]:
    """Return the first learning rates of each method: from `--rates`, from `RATES`, or three around its default rate.

    Raises:
        UserError: A method is unknown, or `--rates` does not parse.
    """
    given = {}
    for text in options.rates:
        method, _, values = text.partition("=")
        try:
            given[method] = tuple(sorted(float(value) for value in values.split(",")))
        except ValueError:
            raise UserError(f"--rates {text}: expected METHOD=RATE,RATE,... such as lora=1e-3,3e-3,1e-2") from None
    for method in (*options.methods, *given):
        if method not in METHODS:
            raise UserError(f"unknown method {method!r}{did_you_mean(method, METHODS)} (known: {', '.join(METHODS)})")
    if unused := [method for method in given if method not in options.methods]:
        raise UserError(f"--rates of {', '.join(unused)}, which --methods leaves out")
    return {method: given.get(method, RATES.get(method) or _around(method)) for method in options.methods}


def _around(method: str) -> tuple[float, ...]:
    middle = METHODS[method].learning_rate
    return tuple(float(f"{factor * middle:g}") for factor in (0.3, 1, 3))


def settings_of(options: argparse.Namespace, about: str) -> Settings:
    """Return what all runs of a grid share.

    Args:
        options: The command line.
        about: A description of settings that have no option, such as the number of examples.

    Raises:
        UserError: No model is given, and that of `pretrain_cifar` does not exist.
    """
    if not options.model and not pretrain_cifar.MODEL.is_file():
        raise UserError(
            f"there is no {pretrain_cifar.MODEL}: python -m experiments.pretrain_cifar writes it; or give another"
            " model with --model"
        )
    model = options.model or str(pretrain_cifar.MODEL)
    return {
        "model": model,
        "digest": digest_of(Path(model).expanduser()),
        "variant": options.variant,
        "classes": classes_of(options),
        "augment": options.augment,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "about": about,
    }


def digest_of(path: Path) -> str:
    """Return a digest of the content of a file or folder, empty if there is none."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digests = []
    for file in filter(Path.is_file, files):
        with file.open("rb") as opened:
            digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16] if digests else ""


def held_out(examples: int) -> int:
    """Return how many of the training examples a search holds out: a fifth, as in VTAB-1k, and at most 2,000.

    >>> held_out(1000), held_out(25_000)
    (200, 2000)
    """
    return min(examples // 5, MOST_HELD_OUT)


def run_config(settings: Settings, run: Run, source: Source, data_dir: str) -> RunConfig:
    """Return the configuration of a run. Its learning rate applies to everything trained, including the head.

    Raises:
        UserError: A value is impossible.
    """
    config = base_config()
    config.seeds = (run.seed,)
    config.model.checkpoint, config.model.variant = settings["model"], settings["variant"]
    config.data.name, config.data.dir, config.data.classes = source.name, data_dir, settings["classes"]
    config.data.augment, config.data.batch_size = settings["augment"], settings["batch_size"]
    config.data.train_examples = source.examples
    if run.part == "search":
        config.data.holdout = held_out(source.examples)
    config.peft.method = run.method
    config.optim.steps, config.optim.warmup_ratio = settings["steps"], 0.1
    config.optim.learning_rate[run.method] = run.learning_rate
    config.log.metrics_every = 100
    return parse(config)


def work(
    options: argparse.Namespace,
    path: Path,
    root: Path,
    sources: Mapping[str, Source],
    about: str,
    tasks: Sequence[str],
    searched: str = "",
) -> None:
    """Make the missing runs of a grid on images.

    Args:
        options: The command line.
        path: The csv file of rows.
        root: The folder for runs, with a separate folder for each content of the weights.
        sources: The data of every task, including the searched one.
        about: As in `settings_of`.
        tasks: The tasks with final runs.
        searched: As in `Grid.searched`.
    """
    rates, settings = rates_of(options), settings_of(options, about)
    note_settings(path, settings)
    folder = root / "-".join(filter(None, (path.stem.partition(f"{root.name}_")[2], settings["digest"][:8])))
    asked = Grid(tuple(tasks), rates, tuple(options.seeds), searched)
    grid.work(asked, path, lambda run: run_config(settings, run, sources[run.task], options.data), folder)
