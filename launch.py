"""Fine-tunes a pretrained model: `python launch.py --config=configs/digits.py`.

Any value of the configuration can be given on the command line: `--config.peft.method=lora`. What a run leaves behind
is in its folder (`--workdir`); the same command goes on with a run that was interrupted.

On several hosts, the same command on each makes one run, with its folder on a file system that they share: Slurm, Cloud
TPU and GKE say themselves who takes part, elsewhere `--coordinator`, `--process_id` and `--num_processes` do.
"""

import functools
import hashlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from surm_jax.devices import processes
from surm_jax.devices.compilation import use_compilation_cache
from surm_jax.errors import UserError, did_you_mean
from surm_jax.record.workdir import CHANGEABLE
from surm_jax.training.config import base_config, keys, parse
from surm_jax.training.modes import describe_run, evaluate_run, export_run, merge_run, predict_run, train_run
from surm_jax.training.run import InterruptedRunError

CONFIGS = Path(__file__).parent / "configs"

MODES = {
    "train": "make the run, or go on with it",
    "evaluate": "test the adapter of the run in --workdir",
    "merge": "write the full model of the run in --workdir",
    "export": "write the run in --workdir for transformers (--format=hf) or peft (--format=peft)",
    "predict": "answer the sentences in --input with the run in --workdir, into --output",
    "describe": "print what would be trained",
}

FORMATS = ("hf", "peft")

FLAGS = ("config", "workdir", "mode", "format", "input", "output", "coordinator", "process_id", "num_processes")


def default_workdir(config_name: str, overrides: dict[str, object]) -> Path:
    """Returns `runs/<configuration>`, with the values that were given on the command line in its name.

    What a run may go on without is left out, all but its weights.

    >>> default_workdir("digits", {"peft.method": "lora", "seeds": (0, 1), "data.dir": "/data"}).as_posix()
    'runs/digits,peft.method=lora,seeds=(0,1)'
    """
    telling = [key for key in sorted(overrides) if key == "model.checkpoint" or key not in CHANGEABLE]
    text = ",".join([config_name, *(f"{key}={overrides[key]}" for key in telling)]).replace(" ", "")
    name = re.sub(r"[^\w.,=()+-]", "_", text)[:150]
    # What does not fit into a name must still tell one run from another.
    return Path("runs") / (name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")


def parse_flags(arguments: Sequence[str]) -> Sequence[str]:
    """Reads the command line.

    Raises:
        UserError: for an unknown configuration, key or flag (the message names the nearest), or a bad value.
    """
    # ml_collections reads the keys while the flag is being defined, and would answer a mistyped one with a traceback.
    defaults = base_config()
    known = keys(defaults)
    for argument in arguments[1:]:
        key = re.match(r"--?config\.([\w.]+)", argument)
        if key and key[1] not in known:
            near = _keys_that_end_in(key[1]) or did_you_mean(key[1], known)
            raise UserError(f"the configuration has no key {key[1]!r}{near}")
        if key and isinstance(defaults[key[1]], ml_collections.ConfigDict):
            inside = _values_in(key[1])
            near = f": give one of its keys, such as --config.{inside[0]}" if inside else " without keys"
            raise UserError(f"config.{key[1]} is a section{near}")
    files = re.findall(r"(?:^|\n)--?config[=\n]([^:\n]+)", "\n".join(arguments))
    for file in files:
        if not Path(file).is_file():
            there = sorted(f"configs/{path.name}" for path in CONFIGS.glob("*.py"))
            near = did_you_mean(file, there) if Path.cwd() == CONFIGS.parent else f"; this program's are in {CONFIGS}"
            raise UserError(f"there is no configuration {file!r} (looked for from {Path.cwd()}){near}")
    try:
        config_flags.DEFINE_config_file(
            "config", str(CONFIGS / "digits.py"), "a file of configs/, and values of its keys"
        )
        flags.DEFINE_string("workdir", None, "folder of the run; by default runs/ and a name made from the flags")
        flags.DEFINE_enum("format", "hf", FORMATS, "what --mode=export writes: the merged model, or the adapter")
        flags.DEFINE_string("input", None, "for --mode=predict: a table of sentences, columns separated by tabs")
        flags.DEFINE_string("output", None, "for --mode=predict: the file that labels and probabilities go to")
        flags.DEFINE_string("coordinator", None, "of several processes by hand: HOST:PORT of process 0")
        flags.DEFINE_integer("process_id", None, "of several processes by hand: the number of this one, from 0")
        flags.DEFINE_integer("num_processes", None, "of several processes by hand: how many there are")
        flags.DEFINE_enum("mode", "train", list(MODES), "; ".join(f"{mode}: {what}" for mode, what in MODES.items()))
        return flags.FLAGS(arguments)
    except flags.UnrecognizedFlagError as error:
        near = _keys_that_end_in(error.flagname) or did_you_mean(error.flagname, FLAGS)
        raise UserError(f"unknown flag --{error.flagname}{near}") from None
    except Exception as error:  # The configuration is a program, and can raise anything.
        last = str(error).strip().splitlines()[-1]
        if isinstance(error, flags.Error):
            # What a configuration itself refuses arrives with the name of its error before it.
            raise UserError(last.removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")) from None
        what = files[-1] if files else "the configuration"
        raise UserError(f"{what} does not work with these flags: {type(error).__name__}: {last}") from None


def _values_in(key: str) -> list[str]:
    """Returns the keys of the values in a section, the nearest first, or the key itself if it is that of a value.

    Where each method has one, the default method's comes before the others.
    """
    config = base_config()
    values = [known for known in keys(config) if not isinstance(config[known], ml_collections.ConfigDict)]
    inside = [value for value in values if f"{value}.".startswith(f"{key}.")]
    return sorted(inside, key=lambda value: (value.count("."), not value.endswith(f".{config.peft.method}"), value))


def _keys_that_end_in(name: str) -> str:
    """Returns a question for the keys, at most three, of which the last parts or all were given; or an empty string."""
    ends = [key for key in keys(base_config()) if f".{key}".endswith(f".{name}")]
    meant = [inside[0] for key in sorted(ends, key=lambda key: key.count(".")) if (inside := _values_in(key))]
    return f"; did you mean {' or '.join(f'--config.{key}' for key in meant[:3])}?" if meant else ""


def main(arguments: Sequence[str]) -> None:
    """Runs one mode."""
    processes.start(flags.FLAGS.coordinator, flags.FLAGS.process_id, flags.FLAGS.num_processes)
    use_compilation_cache()
    if len(arguments) > 1:
        raise UserError(f"unknown argument {arguments[1]!r}: flags begin with --")
    config, workdir, mode = flags.FLAGS.config, flags.FLAGS.workdir, flags.FLAGS.mode
    file, _, argument = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    name = ",".join(filter(None, [Path(file).stem, argument]))
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    workdir = Path(workdir).expanduser() if workdir else default_workdir(name, overrides)
    if mode != "train" and processes.several():
        raise UserError(f"--mode={mode} is the work of one process: start it alone, without a coordinator")
    if mode in ("train", "describe"):
        _check_steps(config.optim.epochs, overrides)
    match mode:
        case "train":
            train_run(parse(config), workdir)
        case "evaluate":
            evaluate_run(workdir, overrides)
        case "merge":
            merge_run(workdir, overrides)
        case "export":
            export_run(workdir, overrides, flags.FLAGS.format)
        case "predict":
            if not (flags.FLAGS.input and flags.FLAGS.output):
                raise UserError("--mode=predict needs --input=FILE.tsv and --output=FILE.tsv")
            source, target = (Path(path).expanduser() for path in (flags.FLAGS.input, flags.FLAGS.output))
            predict_run(workdir, overrides, source, target)
        case "describe":
            describe_run(parse(config))


def _check_steps(epochs: float, overrides: Mapping[str, Any]) -> None:
    if epochs and "optim.steps" in overrides and "optim.epochs" not in overrides:
        raise UserError(
            f"config.optim.epochs={epochs:g} says how many steps there are: give --config.optim.epochs=0 with"
            " --config.optim.steps"
        )


def guarded(step: Callable[[Sequence[str]], Any], arguments: Sequence[str]) -> Any:
    """Runs a step of the program, and turns what the user can put right into one message."""
    try:
        return step(arguments)
    except InterruptedRunError as interruption:
        processes.leave(interruption, interruption.status)
    except KeyboardInterrupt:
        processes.leave(
            "SIGINT: stopped at once; the same command goes on from the last checkpoint, if there is one", 130
        )
    except Exception as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            error = UserError(
                "it does not fit into the device's memory: take a smaller config.data.batch_size (or eval_batch_size),"
                " config.optim.accumulate=4, config.model.remat=block, or several devices with config.mesh.fsdp"
                f" ({str(error).splitlines()[0]})"
            )
        if not isinstance(error, UserError | OSError) and not processes.several():
            raise
        processes.leave_for(error)


if __name__ == "__main__":
    # What Orbax logs of a damaged file is in the message that this program gives.
    logging.set_verbosity(logging.FATAL)
    warnings.formatwarning = lambda message, *_: f"WARNING: {message}\n"
    app.run(functools.partial(guarded, main), flags_parser=functools.partial(guarded, parse_flags))
