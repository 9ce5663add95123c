"""Choice of the execution for `auto`: the fastest one in the most similar measured case.

For each kind of device, `choice.json` holds the machine and the command of the measurement, and the fastest execution
by family, precision, width, tokens and number of parameters.
"""

import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
from jaxtyping import DTypeLike

from surm_jax.structured.algebra import Scaled
from surm_jax.structured.base import StructuredMatrix

TABLE = Path(__file__).with_name("choice.json")
"""The measurements. `python -m benchmarks.structured --write_table` adds the device that it runs on."""


def choose(update: StructuredMatrix, tokens: int, dtype: DTypeLike) -> str:
    """Choose the execution of `x @ (W + update)`: `fft`, `dense` or `fused`.

    The measured case nearest in the logarithms of width, tokens and parameters decides. If the family was not measured
    on this kind of device in this precision, a rule of thumb decides: `fft` if the product has small residuals, as in
    LoRA; otherwise `dense`, which spends most of its time in matrix products.

    Args:
        update: The structured matrix. For a `Scaled`, the matrix inside it decides.
        tokens: Number of rows of `x`.
        dtype: Type of x and W.
    """
    while isinstance(update, Scaled):
        update = update.matrix
    width = math.sqrt(math.prod(update.shape))
    here = [math.log(max(1, size)) for size in (width, tokens, update.num_params)]

    def distance(row: dict[str, Any]) -> float:
        return math.dist(here, [math.log(max(1, row[key])) for key in ("width", "tokens", "parameters")])

    rows = _measured().get((jax.default_backend(), type(update).__name__, str(jax.numpy.dtype(dtype))), ())
    return min(rows, key=distance)["execution"] if rows else "fft" if update.small_residuals else "dense"


@functools.cache
def _measured() -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Return the rows of the table by (kind of device, family, dtype)."""
    table: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for backend, measurement in json.loads(TABLE.read_text()).items():
        for row in measurement["fastest"]:
            table.setdefault((backend, row["family"], row["dtype"]), []).append(row)
    return table
