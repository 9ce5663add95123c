"""What the grids on images share: the backbone, the methods and their learning rates, the settings of all runs."""

import argparse
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from experiments import pretrain_cifar
from experiments.grid import Grid
from experiments.rows import Row, Run, read_settings
from surm_jax import data
from surm_jax.errors import UserError, did_you_mean
from surm_jax.peft import METHODS
from surm_jax.training import base_config, parse
from surm_jax.training.config import RunConfig

# The methods, and the learning rates that each chooses from at least; from lora to circulant_adapter all train as many
# numbers. Where the rates lie was chosen by first tries: 100 steps on 2,000 images, with what `pretrain_cifar.py` makes
# in four passes.
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


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs of a grid have in common.

    Attributes:
        model: the weights, as `config.model.checkpoint`.
        digest: of the file or folder of the weights; empty: they are not a file here, but known by their name.
        variant: as `config.model.variant`; empty: what the weights say themselves.
        classes: the only classes of every set, by name; empty: all.
        augment: as `config.data.augment`.
        steps: of every run.
        batch_size: of every run.
        about: what else is the same, for people: sets or numbers of examples.
    """

    model: str
    digest: str
    variant: str
    classes: tuple[str, ...]
    augment: str
    steps: int
    batch_size: int
    about: str


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that all grids on images have."""
    parser.add_argument("--data", default="", help="folder of prepared TFDS sets")
    parser.add_argument("--name", default="cifar", help="of the files of the results")
    parser.add_argument("--model", default="", help="weights, as config.model.checkpoint; empty: pretrain_cifar.py's")
    parser.add_argument("--variant", default="", help="as config.model.variant; empty: what the weights say")
    parser.add_argument("--classes", nargs="+", default=[], help="only these classes")
    parser.add_argument("--methods", nargs="+", default=list(RATES), help="any of docs/methods.md")
    parser.add_argument("--rates", nargs="+", default=[], metavar="METHOD=RATE,RATE", help="learning rates to try")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--augment", default="crop_flip", help="as config.data.augment")
    parser.add_argument("--report", action="store_true", help="only write the table and the picture")


def settings_of(options: argparse.Namespace, classes: tuple[str, ...], about: str) -> Settings:
    """Returns the settings that the options ask for.

    Raises:
        UserError: if no model is given, and `pretrain_cifar.py` has not made its own.
    """
    if not options.model and not pretrain_cifar.MODEL.is_file():
        raise UserError(
            f"there is no {pretrain_cifar.MODEL}: python -m experiments.pretrain_cifar writes it; or give another"
            " model with --model"
        )
    model = options.model or str(pretrain_cifar.MODEL)
    return Settings(
        model=model,
        digest=digest_of(Path(model).expanduser()),
        variant=options.variant,
        classes=classes,
        augment=options.augment,
        steps=options.steps,
        batch_size=options.batch_size,
        about=about,
    )


def digest_of(path: Path) -> str:
    """Returns what tells the content of a file, or of a folder, from another's; empty if there is none."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digests = []
    for file in filter(Path.is_file, files):
        with file.open("rb") as opened:
            digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16] if digests else ""


def runs_of(root: Path, name: str, settings: Settings) -> Path:
    """Returns the folder of a grid's runs: weights that were replaced by others at the same place have another.

    >>> runs_of(Path("runs"), "cifar", Settings("vit.npz", "0123456789abcdef", "", (), "none", 20, 64, "")).name
    'cifar-01234567'
    """
    return root / "-".join(filter(None, (name, settings.digest[:8])))


def describe(settings: Settings) -> str:
    """Returns the settings as a sentence.

    >>> describe(Settings("vit.npz", "", "B/16", ("cat", "dog"), "none", 2000, 64, "all training examples"))
    'Model vit.npz B/16; all training examples of the classes cat, dog; 2,000 steps of 64 examples, augmentation none.'
    """
    model = f"{settings.model} {settings.variant}".rstrip()
    of = f" of the classes {', '.join(settings.classes)}" if settings.classes else ""
    steps = f"{settings.steps:,} steps of {settings.batch_size} examples, augmentation {settings.augment}"
    return f"Model {model}; {settings.about}{of}; {steps}."


def rates_of(options: argparse.Namespace) -> dict[str, tuple[float, ...]]:
    """Returns the learning rates to try for every method that is asked for.

    Raises:
        UserError: for an unknown method, or rates that are none.
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
    """Three learning rates around the one that the method suggests."""
    middle = METHODS[method].learning_rate
    return tuple(float(f"{factor * middle:g}") for factor in (0.3, 1, 3))


def settings_there(path: Path) -> Settings:
    """Reads the settings of the rows in a csv file.

    Raises:
        UserError: if there are none.
    """
    tree = read_settings(path)
    return Settings(**{**tree, "classes": tuple(tree["classes"])})


def extended(asked: Grid, rows: Sequence[Row]) -> Grid:
    """Returns a grid with the tasks, methods and seeds that the rows have beside its own."""
    final = [row for row in rows if row["part"] == "final"]
    methods = {*asked.rates, *(row["method"] for row in rows)}
    return dataclasses.replace(
        asked,
        tasks=tuple(dict.fromkeys((*asked.tasks, *(row["task"] for row in final)))),
        rates={method: asked.rates.get(method, ()) for method in sorted(methods, key=[*RATES, *METHODS].index)},
        seeds=tuple(dict.fromkeys((*asked.seeds, *(row["seed"] for row in final)))),
    )


def classes_of(options: argparse.Namespace, sets: Sequence[str]) -> tuple[str, ...]:
    """Returns the only classes to use: those asked for; of CIFAR-10, if no set is, those new to `pretrain_cifar.py`'s.

    Raises:
        UserError: if CIFAR-10 is looked at and not there.
    """
    if options.classes or sets:
        return tuple(options.classes)
    return pretrain_cifar.classes_of(pretrain_cifar.OTHERS, options.data)


def load_images(name: str, data_dir: str, classes: Sequence[str]) -> data.ImageDataset:
    """Loads a set of images, to look at its size before anything is trained.

    Raises:
        UserError: if it is not there, has no such classes, or is text.
    """
    dataset = data.load(name, data_dir or None)
    if isinstance(dataset, data.TextDataset):
        raise UserError(f"{name} is a set of sentences, and this is about images")
    return data.keep_classes(dataset, classes) if classes else dataset


def held_out(examples: int) -> int:
    """Returns how many of so many training examples the learning rate is chosen by: a fifth, as in VTAB-1k, or less.

    >>> held_out(1000), held_out(25_000)
    (200, 2000)
    """
    return min(examples // 5, MOST_HELD_OUT)


def run_config(settings: Settings, run: Run, name: str, data_dir: str, examples: int) -> RunConfig:
    """Returns the configuration of a run.

    Args:
        settings: of all runs.
        run: method, learning rate (of all that is trained, the head included), seed, and whether it searches.
        name: of the data set.
        data_dir: the folder of prepared TFDS sets; empty: TFDS's own.
        examples: so many training examples, as `config.data.train_examples`, those held out included.

    Raises:
        UserError: for a value that cannot be.
    """
    config = base_config()
    config.seeds = (run.seed,)
    config.model.checkpoint, config.model.variant = settings.model, settings.variant
    config.data.name, config.data.dir, config.data.classes = name, data_dir, settings.classes
    config.data.augment, config.data.batch_size = settings.augment, settings.batch_size
    config.data.train_examples = examples
    if run.part == "search":
        config.data.holdout = held_out(examples)
    config.peft.method = run.method
    config.optim.steps, config.optim.warmup_ratio = settings.steps, 0.1
    config.optim.learning_rate[run.method] = run.learning_rate
    config.log.metrics_every = 100
    return parse(config)
