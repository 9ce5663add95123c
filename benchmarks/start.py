"""Time what happens before the first step of `python launch.py`, in seconds from the start of the process.

    python -m benchmarks.start [--out=FILE.json] [--rounds=5]

`import flax.nnx` and `import surm_jax` are whole processes that do nothing else. A run first imports the program, then
reads the data, loads and adapts the model (the row `set up` ends when the table of updates is printed), and then traces
and compiles its steps (the row `first step`). In the first round, the cache of compiled programs is empty: these are
the rows with `cold`. The other rows are medians over the other rounds.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.timing import benchmark, setting, table, write

ROUNDS = flags.DEFINE_integer("rounds", 5, "How often each process is started.", lower_bound=2)
ROOT = Path(__file__).resolve().parent.parent
IMPORTS = ("flax.nnx", "surm_jax", "surm_jax.__main__")
# The lines that the program prints at the end of each part.
PARTS = {"set up": "trainable: ", "first step": "compiled for "}


def seconds_of_import(module: str) -> float:
    """Return how long a process takes that only imports a module."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", f"import {module}"], cwd=ROOT, check=True)
    return time.monotonic() - began


def seconds_of_run(folder: Path, workdir: str) -> dict[str, float]:
    """Return after how many seconds a run of one step reaches the end of each part.

    Args:
        folder: The folder for the cache of compiled programs and for the run.
        workdir: The name of the run's folder.
    """
    command = [sys.executable, "-u", "launch.py", f"--workdir={folder / workdir}", "--config.optim.steps=1"]
    began, seconds = time.monotonic(), {}
    # The first run must compile everything, so leave out a cache of programs that the user has chosen.
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["SURM_JAX_CACHE"] = str(folder / "cache")
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            for part, words in PARTS.items():
                if line.startswith(words):
                    seconds[part] = time.monotonic() - began
    return seconds


def main() -> None:
    """Time all processes, print a table, and write the rows to the file of `--out`."""
    imports: dict[str, list[float]] = {f"import {module}": [] for module in IMPORTS}
    runs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS.value):
            for module in IMPORTS:
                imports[f"import {module}"].append(seconds_of_import(module))
            runs.append(seconds_of_run(Path(folder), f"run{number}"))
    measured = {name: statistics.median(values) for name, values in imports.items()}
    measured |= {f"{part}, cold": runs[0][part] for part in PARTS}
    measured |= {part: statistics.median(run[part] for run in runs[1:]) for part in PARTS}
    rows: list[dict[str, Any]] = [
        {"until": name, "seconds": seconds, **setting()} for name, seconds in measured.items()
    ]
    print(table(rows, {"until": "", "seconds": ".2f"}))
    write(rows)


if __name__ == "__main__":
    benchmark(main)
