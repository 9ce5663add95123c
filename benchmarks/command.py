"""What all benchmarks do with their command line: `--out`, and one line for what is wrong, before anything is timed."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags

from surm_jax.errors import UserError

OUT = flags.DEFINE_string("out", None, "Write the rows as JSON to this file.")


def command(main: Callable[[], None]) -> None:
    """Runs a benchmark: a `UserError` becomes one line and the exit status 1."""

    def run(arguments: list[str]) -> None:
        try:
            if len(arguments) > 1:
                raise UserError(f"unknown argument {arguments[1]!r}: flags begin with --")
            if OUT.value is not None and (Path(OUT.value).is_dir() or not Path(OUT.value).parent.is_dir()):
                raise UserError(f"--out={OUT.value} must name a file, in a folder that is there")
            main()
        except UserError as error:
            sys.exit(f"error: {error}")

    # `--help` lists the flags of the module that is run, and this is another.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["out"])
    app.run(run)


def write(rows: list[dict[str, Any]]) -> None:
    """Writes the rows to the file of `--out`, if there is one."""
    if OUT.value is not None:
        Path(OUT.value).write_text(json.dumps(rows, indent=1) + "\n")


def numbers(flag: flags.FlagHolder[list[str]]) -> list[int]:
    """Returns the numbers that a flag lists.

    Raises:
        UserError: if there are none, or not all are whole numbers from 1 on.
    """
    if not flag.value or not all(re.fullmatch(r"[1-9]\d*", text) for text in flag.value):
        raise UserError(f"--{flag.name}={','.join(flag.value)} must list whole numbers from 1 on, such as 1,2,4")
    return [int(text) for text in flag.value]
