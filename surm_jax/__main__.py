"""Command line program that fine-tunes a pretrained model: `python -m surm_jax --config=configs/digits.py`.

In a checkout of the repository, `python launch.py` is the same program. Any value of the configuration can be replaced
on the command line, for example with `--config.peft.method=lora`. A run writes all its files to the folder `--workdir`.
If a run is interrupted, the same command resumes it.

For one run on several hosts, start the same command on each host, with a `--workdir` on a file system that all hosts
share. On Slurm, Cloud TPU and GKE, JAX connects the processes by itself. Elsewhere, give `--coordinator`,
`--process_id` and `--num_processes`.
"""

import functools
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from surm_jax.devices import processes
from surm_jax.devices.compilation import use_compilation_cache
from surm_jax.errors import UserError, did_you_mean
from surm_jax.record.inputs import started_in
from surm_jax.record.workdir import default_workdir
from surm_jax.training import answers, modes
from surm_jax.training.parsing import base_config, meant_key, parse, plugins_of, require_key, require_steps
from surm_jax.training.run import InterruptedRunError

# In a checkout of the repository, the folder `configs` is next to the package. In an installed package, it is inside.
_HERE = Path(__file__).resolve().parent
CONFIGS = next((folder for folder in (_HERE / "configs", _HERE.parent / "configs") if folder.is_dir()), _HERE)

MODES = {
    "train": "make the run, or resume it",
    "evaluate": "test the adapter of the run in --workdir",
    "merge": "write the full model of the run in --workdir",
    "export": "write the run in --workdir for transformers (--format=hf) or peft (--format=peft)",
    "predict": "label the sentences in --input with the run in --workdir, and write the labels to --output",
    "generate": "continue the prompts in --input with the run in --workdir, and write the answers to --output",
    "describe": "print what would be trained",
}
FORMATS = ("hf", "peft")
FLAGS = (
    *("config", "workdir", "mode", "format", "rank", "force", "input", "output"),
    *("max_new_tokens", "temperature", "top_k", "top_p", "stop", "seed", "stream"),
    *("coordinator", "process_id", "num_processes"),
)


def parse_flags(arguments: Sequence[str]) -> Sequence[str]:
    """Parse the flags and the configuration on the command line, and return the arguments that are not flags.

    The values of the flags are then in `absl.flags.FLAGS`.

    Args:
        arguments: The command line. The first item is the name of the program, as in `sys.argv`.

    Raises:
        UserError: A configuration file, configuration key or flag is unknown, a value is not allowed, or a plugin
            cannot be imported. For an unknown name, the message suggests a similar one.
    """
    # Check the configuration keys here, because ml_collections would show a traceback for a mistyped key.
    text = "\n".join(arguments)
    plugins = plugins_of(re.findall(r"(?:^|\n)--?config\.plugins[=\n]([^\n]*)", text))
    workdirs = re.findall(r"(?:^|\n)--?workdir[=\n]([^\n]*)", text)
    defaults = base_config(plugins, started_in(Path(workdirs[-1]).expanduser()) if workdirs else ())
    for argument in arguments[1:]:
        if key := re.match(r"--?config\.([\w.]+)", argument):
            require_key(defaults, key[1])
    files = re.findall(r"(?:^|\n)--?config[=\n]([^:\n]+)", text)
    for file in files:
        if (ours := CONFIGS.parent / file).is_file() and not Path(file).is_file():
            # Make configs/NAME.py work in every working directory, as the path of a configuration of this program.
            arguments = [
                re.sub(rf"^(--?config=)?{re.escape(file)}(?=:|$)", rf"\g<1>{ours}", word) for word in arguments
            ]
        elif not Path(file).is_file():
            there = sorted(f"configs/{path.name}" for path in CONFIGS.glob("*.py"))
            near = (
                did_you_mean(file, there)
                if Path.cwd() == CONFIGS.parent
                else f"; those of this program are in {CONFIGS}"
            )
            raise UserError(f"there is no configuration {file!r} (looked for from {Path.cwd()}){near}")
    try:
        _define_flags()
        return flags.FLAGS(arguments)
    except flags.UnrecognizedFlagError as error:
        near = meant_key(defaults, error.flagname) or did_you_mean(error.flagname, FLAGS)
        raise UserError(f"unknown flag --{error.flagname}{near}") from None
    except Exception as error:  # A configuration is a program, and can raise anything.
        last = str(error).strip().splitlines()[-1]
        if isinstance(error, flags.Error):
            # absl turns a UserError of the configuration into text that begins with the name of the class.
            raise UserError(last.removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")) from None
        what = files[-1] if files else "the configuration"
        raise UserError(f"{what} does not work with these flags: {type(error).__name__}: {last}") from None


def _define_flags() -> None:
    config_flags.DEFINE_config_file("config", str(CONFIGS / "digits.py"), "a file of configs/, and values of its keys")
    flags.DEFINE_string("workdir", None, "folder of the run; by default runs/ and a name made from the flags")
    flags.DEFINE_enum("mode", "train", list(MODES), "; ".join(f"{mode}: {what}" for mode, what in MODES.items()))
    flags.DEFINE_enum("format", "hf", FORMATS, "what --mode=export writes: the merged model, or the adapter")
    flags.DEFINE_integer("rank", None, "with --format=peft: convert every update to LoRA of this rank", lower_bound=1)
    flags.DEFINE_bool("force", False, "with --rank: write the adapter even if an update has an error above 50 %")
    flags.DEFINE_string("input", None, "a table of sentences (--mode=predict), or JSON lines of prompts (generate)")
    flags.DEFINE_string("output", None, "the file for labels and probabilities, or for answers")
    own = "for --mode=generate; by default as generation_config.json of the model says"
    flags.DEFINE_integer("max_new_tokens", None, f"largest number of new tokens, {own}", lower_bound=1)
    flags.DEFINE_float("temperature", None, f"what logits are divided by, and 0 for the most probable token, {own}")
    flags.DEFINE_integer("top_k", None, f"number of tokens to choose from, and 0 for all, {own}")
    flags.DEFINE_float("top_p", None, f"probability of the tokens to choose from, {own}")
    flags.DEFINE_multi_string("stop", [], "for --mode=generate: a text before which an answer ends; may be repeated")
    flags.DEFINE_integer("seed", 0, "for --mode=generate: the seed of random choices", lower_bound=0)
    flags.DEFINE_bool("stream", False, "for --mode=generate: print the answers while they are written, one by one")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for several processes started by hand")
    flags.DEFINE_integer("process_id", None, "number of this process, from 0, for several processes started by hand")
    flags.DEFINE_integer("num_processes", None, "number of processes, for several processes started by hand")


def main(arguments: Sequence[str]) -> None:
    """Run the program in the mode that the flag `--mode` names. Call `parse_flags` first.

    Args:
        arguments: The arguments that `parse_flags` returned. There must be only one, the name of the program.

    Raises:
        UserError: There are more arguments, or the flags contradict each other. The selected mode may raise other
            errors of this type, for example if the folder `--workdir` does not hold a run.
    """
    given = flags.FLAGS
    processes.start(given.coordinator, given.process_id, given.num_processes)
    use_compilation_cache()
    if len(arguments) > 1:
        raise UserError(f"unknown argument {arguments[1]!r}: flags begin with --")
    file, _, argument = config_flags.get_config_filename(given["config"]).partition(":")
    overrides = config_flags.get_override_values(given["config"])
    name = ",".join(filter(None, [Path(file).stem, argument]))
    workdir = Path(given.workdir).expanduser() if given.workdir else default_workdir(name, overrides)
    if given.mode != "train" and processes.several():
        raise UserError(f"--mode={given.mode} runs in one process: start only one, without a coordinator")
    if given.mode in ("train", "describe"):
        require_steps(given.config, overrides)
    match given.mode:
        case "train":
            modes.train_run(parse(given.config), workdir)
        case "evaluate":
            modes.evaluate_run(workdir, overrides)
        case "merge":
            modes.merge_run(workdir, overrides)
        case "export":
            modes.export_run(workdir, overrides, given.format, rank=given.rank, force=given.force)
        case "predict":
            if not (given.input and given.output):
                raise UserError("--mode=predict needs --input=FILE.tsv and --output=FILE.tsv")
            answers.predict_run(workdir, overrides, Path(given.input).expanduser(), Path(given.output).expanduser())
        case "generate":
            if not (given.input and given.output):
                raise UserError("--mode=generate needs --input=FILE.jsonl and --output=FILE.jsonl")
            answers.generate_run(
                workdir,
                overrides,
                Path(given.input).expanduser(),
                Path(given.output).expanduser(),
                stops=tuple(given.stop),
                seed=given.seed,
                stream=given.stream,
                **{name: given[name].value for name in ("max_new_tokens", "temperature", "top_k", "top_p")},
            )
        case "describe":
            modes.describe_run(parse(given.config))


def guarded(step: Callable[[Sequence[str]], Any], arguments: Sequence[str]) -> Any:
    """Return `step(arguments)`. If it raises an exception, end the program with a message and an exit status.

    A short message without a traceback is printed for these exceptions:

    - `InterruptedRunError`. The exit status is that of the exception.
    - `KeyboardInterrupt`. The exit status is 130.
    - `BrokenPipeError` of the output, which a program such as `head` has closed. The exit status is 141.
    - `UserError`, `OSError`, and JAX's error for too little device memory. The exit status is 1.

    For any other exception, the traceback is printed, and the exit status is 1. In a run of several processes,
    `processes.leave_for` does this, and prints a message instead if the exception means that another process is gone.
    """
    try:
        result = step(arguments)
        sys.stdout.flush()
        return result
    except InterruptedRunError as interruption:
        processes.leave(interruption, interruption.status)
    except KeyboardInterrupt:
        processes.leave("SIGINT: stopped at once; the same command resumes from the last checkpoint, if any", 130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and error.filename is None:
            # Python would try to write the rest of the output when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            processes.leave("error: the reader of the output has closed it (broken pipe)", 141)
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            error = UserError(
                "the run does not fit into device memory: use a smaller config.data.batch_size (or eval_batch_size),"
                " config.optim.accumulate=4, config.model.remat=block, or several devices with config.mesh.fsdp"
                f" ({str(error).splitlines()[0]})"
            )
        if not isinstance(error, UserError | OSError) and not processes.several():
            raise
        processes.leave_for(error)


def _silence_echoes() -> None:
    """Keep libraries from printing tracebacks of failures that the program reports itself.

    If the disk is full or a run is stopped, the program ends with one message. Without this function, the
    threads of Orbax, and files that Python closes at the end, would print the same failure again.
    """

    def is_echo(error: BaseException | None) -> bool:
        return isinstance(error, OSError) or str(error) == "Event loop is closed"

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread() or not is_echo(error):
            sys.__excepthook__(kind, error, trace)

    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.excepthook = show
    threading.excepthook = lambda raised: None if is_echo(raised.exc_value) else threading.__excepthook__(raised)
    sys.unraisablehook = lambda raised: None if is_echo(raised.exc_value) else sys.__unraisablehook__(raised)


def run() -> None:
    """Run the program with the arguments of the command line. This is the entry point of the program."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # `launch.py` sets it while this module is imported.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _silence_echoes()
    # Silence the log of Orbax. If a file is damaged, the message of this program says so too.
    logging.set_verbosity(logging.FATAL)
    warnings.formatwarning = lambda message, *_: f"WARNING: {message}\n"
    app.run(functools.partial(guarded, main), flags_parser=functools.partial(guarded, parse_flags))


if __name__ == "__main__":
    run()
