"""The options, learning rates and configurations that `experiments.image_table` and `experiments.low_data` share."""

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

# The learning rates that the search of each method begins with. They were chosen in short runs of 100 steps on 2,000
# images, with a model that `pretrain_cifar` had trained for four passes. The methods from lora to circulant_adapter
# train equally many parameters.
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
# The largest number of training examples that a search holds out.
MOST_HELD_OUT = 2000

Settings = dict[str, Any]


class Source(NamedTuple):
    """The data of a task.

    Attributes:
        name: The name of the data set, the value of `config.data.name`.
        examples: The number of training examples to use, including those that a search holds out.
    """

    name: str
    examples: int


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command-line options that `experiments.image_table` and `experiments.low_data` share."""
    parser.add_argument("--data", default="", help="folder of prepared TFDS sets")
    parser.add_argument("--sets", nargs="+", default=[], help="as config.data.name; default: five classes of CIFAR-10")
    parser.add_argument("--name", default="cifar", help="name of the grid in the files of results")
    parser.add_argument("--model", default="", help="as config.model.checkpoint; default: the model of pretrain_cifar")
    parser.add_argument("--variant", default="", help="as config.model.variant; default: what the weights say")
    parser.add_argument("--image-size", type=int, default=0, help="as config.model.image_size; default: the model's")
    parser.add_argument("--classes", nargs="+", default=[], help="only these classes")
    parser.add_argument("--methods", nargs="+", default=list(RATES), help="any of docs/methods.md")
    parser.add_argument("--rates", nargs="+", default=[], metavar="METHOD=RATE,RATE", help="learning rates to try")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--augment", default="crop_flip", help="as config.data.augment")
    parser.add_argument("--report", action="store_true", help="start no run, only report")


def classes_of(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the names of the classes to train on. An empty tuple means all classes of the data set.

    Without the options `--classes` and `--sets` they are the five classes of CIFAR-10 that `pretrain_cifar` leaves out.

    Raises:
        UserError: Without the options, the names of those five classes are read from CIFAR-10, and this data set does
            not exist.
    """
    if options.classes or options.sets:
        return tuple(options.classes)
    return pretrain_cifar.classes_of(pretrain_cifar.OTHERS, options.data)


def count_images(name: str, options: argparse.Namespace) -> int:
    """Return how many training images of a data set belong to the classes that `classes_of` returns.

    Raises:
        UserError: The data set does not exist, lacks one of the classes, or holds texts.
    """
    dataset = data.load(name, options.data or None)
    if isinstance(dataset, data.TextDataset):
        raise UserError(f"{name} is a set of sentences, and this grid needs images")
    classes = classes_of(options)
    return len((data.keep_classes(dataset, classes) if classes else dataset).train)


def rates_of(options: argparse.Namespace) -> dict[str, tuple[float, ...]]:
    """Return the learning rates that the search of each method of `--methods` begins with.

    They come from the option `--rates` or, if it does not name the method, from `RATES`. For a method that is in
    neither, they are 0.3, 1 and 3 times the method's default learning rate.

    Raises:
        UserError: A method is unknown, `--rates` does not parse, or it names a method that `--methods` leaves out.
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
    """Return the settings that all runs of a grid share, for the json file beside its csv file.

    Args:
        options: The parsed command line.
        about: A description of the settings for which there is no option, such as the number of training examples.

    Raises:
        UserError: `--model` is not given, and the model of `pretrain_cifar` does not exist.
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
        "image_size": options.image_size,
        "classes": classes_of(options),
        "augment": options.augment,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "about": about,
    }


def digest_of(path: Path) -> str:
    """Return a hash of the content of a file or of all files in a folder.

    It is 16 hexadecimal digits long, or empty if there is no such file or folder.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digests = []
    for file in filter(Path.is_file, files):
        with file.open("rb") as opened:
            digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16] if digests else ""


def held_out(examples: int) -> int:
    """Return how many training examples a search holds out: a fifth, as in VTAB-1k, but at most 2,000.

    >>> held_out(1000), held_out(25_000)
    (200, 2000)
    """
    return min(examples // 5, MOST_HELD_OUT)


def run_config(settings: Settings, run: Run, source: Source, data_dir: str) -> RunConfig:
    """Return the training configuration of one run of a grid.

    The learning rate of the run applies to all trained parameters, including the head.

    Args:
        settings: The settings of the grid, as `settings_of` returns them.
        run: The run.
        source: The data of the run's task.
        data_dir: The folder of prepared TFDS data sets. An empty string means the default folder.

    Raises:
        UserError: A setting has a value that the training configuration does not allow.
    """
    config = base_config()
    config.seeds = (run.seed,)
    config.model.checkpoint, config.model.variant = settings["model"], settings["variant"]
    config.model.image_size = settings["image_size"]
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
    """Do all runs of a grid on images that are not finished yet.

    Args:
        options: The parsed command line.
        path: The csv file of rows.
        root: The folder in which every grid has its own folder of runs. If the content of the file of pretrained
            weights changes, the grid gets another folder.
        sources: The data of every task, including the task `searched`.
        about: A description of the settings for which there is no option, as in `settings_of`.
        tasks: The tasks that final runs are done for.
        searched: The task on which learning rates are searched for all tasks, as in `Grid`.

    Raises:
        UserError: An option is wrong, or the csv file holds rows that were made with other settings.
        InterruptedRunError: A signal asked the process to stop.
    """
    rates, settings = rates_of(options), settings_of(options, about)
    note_settings(path, settings)
    folder = root / "-".join(filter(None, (path.stem.partition(f"{root.name}_")[2], settings["digest"][:8])))
    asked = Grid(tuple(tasks), rates, tuple(options.seeds), searched)
    grid.work(asked, path, lambda run: run_config(settings, run, sources[run.task], options.data), folder)
