"""The execution that `auto` stands for: the fastest one in the most similar case that was measured.

`choice.json` holds, for each kind of device, on what and by which command it was measured, and the fastest execution by
family, precision, width, tokens and number of parameters.
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
"""What was measured. `python -m benchmarks.structured --write_table` adds the device that it runs on."""


def choose(update: StructuredMatrix, tokens: int, dtype: DTypeLike) -> str:
    """The execution of `x @ (W + update)`: `fft`, `dense` or `fused`.

    The case nearest in the logarithms of width, tokens and parameters decides. Without a measurement of the family on
    this kind of device in this precision: `fft` for a lean product, such as LoRA's, otherwise `dense`, of whose time
    matrix products have the largest part.

    Args:
        update: The structured matrix; of a multiple, what it is a multiple of.
        tokens: How many rows `x` has.
        dtype: Of x and W.
    """
    while isinstance(update, Scaled):
        update = update.matrix
    width = math.sqrt(math.prod(update.shape))
    here = [math.log(max(1, size)) for size in (width, tokens, update.num_params)]

    def distance(row: dict[str, Any]) -> float:
        return math.dist(here, [math.log(max(1, row[key])) for key in ("width", "tokens", "parameters")])

    rows = _measured().get((jax.default_backend(), type(update).__name__, str(jax.numpy.dtype(dtype))), ())
    return min(rows, key=distance)["execution"] if rows else "fft" if update.lean else "dense"


@functools.cache
def _measured() -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """The rows of the table by (kind of device, family, dtype)."""
    table: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for backend, measurement in json.loads(TABLE.read_text()).items():
        for row in measurement["fastest"]:
            table.setdefault((backend, row["family"], row["dtype"]), []).append(row)
    return table
