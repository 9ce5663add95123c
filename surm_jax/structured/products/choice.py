"""Choose how to compute `x @ (W + M)` when the user leaves the choice open (the execution `auto`).

The execution that was fastest in the most similar measured case is used. `choice.json` holds the measurements, for each
JAX backend such as "cpu", with the machine and the command. A case is a combination of family, dtype, width of the
layer, number of tokens and number of parameters. `surm_jax.structured.products.execution` explains the executions.
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
"""Path of the file with the measurements.

The command `python -m benchmarks.structured --write_table` measures the executions on the device on which it runs, and
stores the fastest execution of each measured case in this file.
"""


def choose(update: StructuredMatrix, tokens: int, dtype: DTypeLike) -> str:
    """Return the name of the execution to use for `x @ (W + update)`: `fft`, `dense` or `fused`.

    It is the fastest execution of the most similar case that was measured for the family of `update`, on this JAX
    backend and in this dtype. Similar means a small Euclidean distance between the logarithms of three numbers: the
    width of the layer, sqrt(in_features * out_features), the number of tokens, and the number of parameters of the
    update.

    If no case was measured, it is `fft` for families whose product stores little for the backward pass, such as LoRA
    (`StructuredMatrix.small_residuals`), and otherwise `dense`.

    Args:
        update: The structured matrix. For a `Scaled`, which is a multiple of a matrix, the matrix inside it is used.
        tokens: Number of rows of `x`, the product of its leading dimensions.
        dtype: Dtype of the frozen kernel W, or dtype of `x` if the product is `x @ update`, without a kernel.
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
    """Return the cases in `choice.json`, by the triple (JAX backend, name of the family, dtype)."""
    table: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for backend, measurement in json.loads(TABLE.read_text()).items():
        for row in measurement["fastest"]:
            table.setdefault((backend, row["family"], row["dtype"]), []).append(row)
    return table
