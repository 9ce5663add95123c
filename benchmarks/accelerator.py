"""Measure everything that is worth measuring on one accelerator, in one call of at most eight minutes.

    python -m benchmarks.accelerator [--folder=benchmarks/results/accelerator] [--minutes=8] [--tiny]

The parts are other benchmarks. Each runs as a process of its own, one after another. Those that say most come first: if
the time is up, the part that runs is stopped and the others are left out, and the last line names them. Every part
writes its rows to the file `PART.json` of the folder, and its tables to `PART.txt`.

The layers also teach `auto` which execution is the fastest on this device: they add it to
`surm_jax/structured/products/choice.json`, of which the folder gets a copy.

With `--tiny` all sizes are so small that the times mean nothing, and `choice.json` stays as it is. So every part can be
tried on any machine.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from benchmarks.timing import benchmark
from surm_jax.errors import UserError
from surm_jax.structured.products.choice import TABLE

FOLDER = flags.DEFINE_string("folder", "benchmarks/results/accelerator", "The folder for rows and tables.")
MINUTES = flags.DEFINE_float("minutes", 8, "The time for all parts together.", lower_bound=0)
TINY = flags.DEFINE_bool("tiny", False, "Use tiny sizes, to try every part on any machine.")


def parts() -> dict[str, list[str]]:
    """Return the parts by name, the most telling first. Each is the module of a benchmark and its arguments."""
    methods = "--methods=circulant,toeplitz,kronecker,low_displacement,full"
    if TINY.value:
        sizes, layer = ["16x8"], ["--families=Circulant", "--rounds=1"]
        models, step = {"vit": "digits", "bert": "tiny"}, ["--methods=circulant", "--batch=2", "--rounds=1"]
    else:
        sizes, layer = ["768x6304", "4096x2048", "1024x8192"], ["--write_table"]
        models, step = {"vit": "B/16", "bert": "base"}, [methods, "--batch=64"]
    layers, steps = [], []
    for dtype in ("float32", "bfloat16"):
        for size in sizes:
            layers.append((f"layer_{size}_{dtype}", ["structured", f"--sizes={size}", f"--dtypes={dtype}", *layer]))
        for model, size in models.items():
            arguments = ["step", f"--model={model}", f"--variant={size}", f"--dtype={dtype}", *step]
            steps.append((f"{model}_{dtype}", arguments))
    half = len(layers) // 2
    first = [layers[0], layers[half]]
    return dict([*first, *steps, *(part for part in layers if part not in first)])


def run(name: str, module: str, arguments: list[str], folder: Path, seconds: float) -> bool:
    """Run a benchmark as a process of its own, show what it prints, and store it with the rows.

    Args:
        name: The name of the part.
        module: The name of the benchmark.
        arguments: Its arguments.
        folder: The folder for the files.
        seconds: After this time the process is stopped.

    Returns:
        Whether the benchmark ended by itself and without an error.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, f"--out={folder / name}.json"]
    with (folder / f"{name}.txt").open("w") as file:
        print(f"{name}: {' '.join(command[1:])}", flush=True)
        try:
            done = subprocess.run(command, stdout=file, timeout=max(seconds, 0), check=False)
        except subprocess.TimeoutExpired:
            return False
    print((folder / f"{name}.txt").read_text(), flush=True)
    return done.returncode == 0


def main() -> None:
    """Run all parts until the time is up, and name those that are missing.

    Raises:
        UserError: A part failed, or was stopped or left out because the time was up.
    """
    folder, end, missing = Path(FOLDER.value), time.monotonic() + 60 * MINUTES.value, []
    folder.mkdir(parents=True, exist_ok=True)
    for name, (module, *arguments) in parts().items():
        if time.monotonic() >= end or not run(name, module, arguments, folder, end - time.monotonic()):
            missing.append(name)
    shutil.copy(TABLE, folder)
    if missing:
        raise UserError(f"not measured within {MINUTES.value:g} minutes, or failed: {', '.join(missing)}")


if __name__ == "__main__":
    benchmark(main)
