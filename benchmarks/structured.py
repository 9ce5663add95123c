"""Time a linear layer with a structured update, forward and backward, against the frozen layer and LoRA r = 1.

    python -m benchmarks.structured [--out=FILE.json] [--families=Circulant,Kronecker] [--sizes=768x6304,4096x2048]
                                    [--dtypes=float32,bfloat16] [--rounds=11] [--write_table]

A program is one family of structured matrices with its options and one execution, which is a way to compute the
product. It gets an input and a gradient with respect to the output. It computes the output, and the gradients with
respect to the input and to the parameters of the update. Times are compared with two references. One is called
`frozen`: it has no update, computes only `x @ W` and `dy @ W^T`, and is a lower bound. The other is LoRA with r = 1 in
its textbook form, `x @ W + (x @ down) @ up`, which is the row with the family `LowRank` and the execution `fft`.

Each program has a row of results. `ms` is its median time over several rounds, in which all programs of a size take
turns. `ratio_to_frozen` and `ratio_to_lora` compare it with the references. `temp_bytes` is the temporary memory of the
compiled program, and `peak_bytes` adds its arguments and results.

If the file of `--out` has rows with the same width, tokens and dtype, the new rows replace them. Its other rows stay.
With `--write_table`, the fastest execution of each case (family, number of parameters, width, tokens and dtype) is
stored as the one that `auto` chooses (`surm_jax/structured/products/choice.json`).
"""

import concurrent.futures
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.layer import check_sizes, frozen_step, random_update, step
from benchmarks.timing import OUT, benchmark, device, medians, setting, table, write
from surm_jax.errors import UserError
from surm_jax.structured import EXECUTIONS, FAMILIES
from surm_jax.structured.products.choice import TABLE

FAMILY_NAMES = flags.DEFINE_list("families", None, "Families to time; all of them by default.")
SIZES = flags.DEFINE_list("sizes", "768x256,768x1576,768x6304,4096x2048", "Widths and tokens.")
DTYPES = flags.DEFINE_list("dtypes", "float32", "Dtypes of input and kernel: float32, bfloat16.")
ROUNDS = flags.DEFINE_integer("rounds", 11, "How often each program is timed.", lower_bound=1)
WRITE_TABLE = flags.DEFINE_bool("write_table", False, "Make `auto` choose by these measurements.")

#: The keys that identify a case in the table from which `auto` chooses an execution.
CASE = ("family", "dtype", "width", "tokens", "parameters")
COLUMNS = {
    "family": "",
    "options": "",
    "execution": "",
    "ms": ".2f",
    "ratio_to_frozen": ".3f",
    "ratio_to_lora": ".3f",
    "temp_bytes": ",",
    "peak_bytes": ",",
}


def cases(families: list[str], width: int, half: bool) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield the programs to time as (family, options, execution), beginning with the reference `LowRank`.

    Args:
        families: The names of the families.
        width: The number of rows and of columns of the matrices.
        half: Whether the dtype is bfloat16, for which there is no execution `fused`.
    """
    for family in dict.fromkeys(["LowRank", *families]):
        for options in FAMILIES[family].typical_options((width, width)):
            for execution in EXECUTIONS:
                if not (half and execution == "fused"):
                    yield family, options, execution


def lowerings(families: list[str], width: int, dtype: str, arrays: tuple[jax.Array, jax.Array, jax.Array]):
    """Yield each program of one size with its case, as (family, options, execution), and its update.

    Args:
        families: The names of the families to time.
        width: The number of input and of output features.
        dtype: The dtype of the input and the kernel.
        arrays: The input, the kernel, and the gradient with respect to the output.
    """
    x, kernel, dy = arrays
    for case in [("frozen", {}, "frozen"), *cases(families, width, dtype != "float32")]:
        family, options, execution = case
        update = None if family == "frozen" else random_update(family, width, options)
        function = frozen_step if update is None else functools.partial(step, execution=execution)
        yield case, update, jax.jit(function).lower(x, kernel, update, dy)


def measure(families: list[str], width: int, tokens: int, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """Time all programs of one size, and return their rows of results.

    Args:
        families: The names of the families to time.
        width: The number of input and of output features.
        tokens: The number of rows of the input.
        dtype: The dtype of the input and the kernel.
        rounds: How often each program is timed.
    """
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    x, kernel, dy = draw(tokens, width), draw(width, width) * jnp.asarray(width**-0.5, dtype), draw(tokens, width)
    rows, programs = [], {}
    # Compile in threads: most of it happens outside of Python.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compilations = [
            (*case, update, pool.submit(lowered.compile))
            for case, update, lowered in lowerings(families, width, dtype, (x, kernel, dy))
        ]
    for family, options, execution, update, compilation in compilations:
        compiled = compilation.result()
        memory = compiled.memory_analysis()
        programs[len(rows)] = functools.partial(compiled, x, kernel, update, dy)
        rows.append(
            {
                "family": family,
                "options": options,
                "execution": execution,
                "width": width,
                "tokens": tokens,
                "dtype": dtype,
                **setting(),
                "parameters": update.num_params if update else 0,
                "temp_bytes": memory.temp_size_in_bytes,
                "peak_bytes": memory.temp_size_in_bytes
                + memory.argument_size_in_bytes
                + memory.output_size_in_bytes
                - memory.alias_size_in_bytes,
            }
        )
    times = medians(programs, rounds)
    frozen = times[0]
    lora = next(times[i] for i, row in enumerate(rows) if (row["family"], row["execution"]) == ("LowRank", "fft"))
    return [
        {**row, "ms": 1e3 * times[i], "ratio_to_frozen": times[i] / frozen, "ratio_to_lora": times[i] / lora}
        for i, row in enumerate(rows)
    ]


def fastest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the fastest execution (way to compute the product) of each case, as entries of the table for `auto`."""
    best: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        if row["execution"] in ("auto", "frozen"):
            continue
        case = tuple(row[key] for key in CASE)
        if case not in best or row["ms"] < best[case]["ms"]:
            best[case] = row
    return [{key: row[key] for key in (*CASE, "execution")} for row in best.values()]


def write_table(rows: list[dict[str, Any]]) -> None:
    """Store the fastest execution of each case in the table from which `auto` chooses.

    Other cases stay in it.

    Args:
        rows: The rows of results.
    """
    measured = json.loads(TABLE.read_text())
    old = measured.get(jax.default_backend(), {}).get("fastest", [])
    best = {tuple(row[key] for key in CASE): row for row in [*old, *fastest(rows)]}
    measured[jax.default_backend()] = {
        **setting(),
        "command": "python -m benchmarks.structured --write_table",
        "fastest": list(best.values()),
    }
    TABLE.write_text(json.dumps(measured, indent=1) + "\n")


def earlier_rows() -> dict[tuple[int, int, str], list[dict[str, Any]]]:
    """Return the rows that the file of `--out` already holds, by (width, tokens, dtype).

    Raises:
        UserError: The file holds something other than rows of this benchmark.
    """
    sizes: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    if OUT.value is not None and Path(OUT.value).exists():
        try:
            for row in json.loads(Path(OUT.value).read_text()):
                sizes.setdefault((row["width"], row["tokens"], row["dtype"]), []).append(row)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--out={OUT.value} holds something other than rows of this benchmark") from None
    return sizes


def main() -> None:
    """Time the products that the flags choose, print tables of the results, and write the files."""
    families = FAMILY_NAMES.value or list(FAMILIES)
    unknown = set(families) - set(FAMILIES)
    if unknown:
        raise UserError(f"unknown families {', '.join(sorted(unknown))}; known: {', '.join(FAMILIES)}")
    for size in SIZES.value:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size):
            raise UserError(f"--sizes={size}: a size is width x tokens, such as 768x6304")
        try:
            check_sizes(families, int(size.split("x")[0]))
        except UserError as error:
            raise UserError(f"--sizes={size}: {error}") from None
    for dtype in DTYPES.value:
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"--dtypes={dtype}: known are float32 and bfloat16")
    rows, sizes = [], earlier_rows()
    for dtype in DTYPES.value:
        for size in SIZES.value:
            width, tokens = map(int, size.split("x"))
            print(f"\nwidth {width}, {tokens} tokens, {dtype}, on {device()}", flush=True)
            new = sizes[width, tokens, dtype] = measure(families, width, tokens, dtype, ROUNDS.value)
            rows += new
            print(table([{**row, "options": _options(row)} for row in new], COLUMNS), flush=True)
            write([row for size in sizes.values() for row in size])
    if WRITE_TABLE.value:
        write_table(rows)


def _options(row: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in row["options"].items())


if __name__ == "__main__":
    benchmark(main)
