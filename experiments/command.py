"""What the command lines of experiments share: reporting errors, and loading and changing configurations."""

import ast
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from surm_jax.errors import UserError, did_you_mean
from surm_jax.training.parsing import keys
from surm_jax.training.run import InterruptedRunError


def command(main: Callable[[], None]) -> None:
    """Run the main function of a script, and end the process on an error without a traceback.

    A `UserError` or an `OSError` ends the process with an error message in one line. If a signal interrupted a training
    run, the process ends with the exit status of that signal.
    """
    try:
        main()
    except InterruptedRunError as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(interruption.status)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


def load_job(name: str) -> ml_collections.ConfigDict:
    """Return the training configuration that a file defines in its function `get_config`.

    Args:
        name: `FILE.py` or `FILE.py:ARGUMENT`. The text ARGUMENT is passed to `get_config`.

    Raises:
        UserError: There is no such file, it has no function `get_config`, or the argument is wrong.
    """
    file, _, argument = name.partition(":")
    if not Path(file).is_file():
        raise UserError(f"there is no configuration {file!r}, such as configs/digits.py")
    make = runpy.run_path(file).get("get_config")
    if make is None:
        raise UserError(f"{file} has no function get_config, which makes the configuration of a job")
    return make(argument) if argument else make()


def set_values(config: ml_collections.ConfigDict, texts: Sequence[str], reserved: Sequence[str]) -> None:
    """Set keys of a configuration to the values of the option `--set`.

    Args:
        config: The configuration, which is changed in place.
        texts: The arguments of `--set`, each of the form `KEY=VALUE`.
        reserved: The keys that the experiment sets itself. A key that begins with one of them may not be set.

    Raises:
        UserError: A key is unknown or reserved, or a value does not fit its key.
    """
    for text in texts:
        key, _, value = text.partition("=")
        if key not in keys(config):
            raise UserError(f"--set {text}: the configuration has no key {key!r}{did_you_mean(key, keys(config))}")
        if key.startswith(tuple(reserved)):
            raise UserError(f"--set {text}: the experiment sets {key} itself")
        try:
            config.update_from_flattened_dict({key: _literal(value)})
        except (TypeError, ValueError) as error:
            raise UserError(f"--set {text}: {error}") from None


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
