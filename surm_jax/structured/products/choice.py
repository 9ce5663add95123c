"""Choice of the execution behind the name `auto`: the execution that was fastest in the most similar measured case.

An execution is one way to compute `x @ (W + M)`; see `surm_jax.structured.products.execution`. The measurements are in
`choice.json`. For each JAX backend, such as "cpu", this file names the machine and the command of the measurement. It
lists the fastest execution for each measured combination of family, dtype, width of the layer, number of tokens and
number of parameters.
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

    The function looks up the cases that were measured for the family of `update` on this JAX backend in this dtype, and
    returns the fastest execution of the most similar case. A case is described by three numbers: the width of the
    layer, which is the square root of in_features times out_features, the number of tokens, and the number of
    parameters of the update. The most similar case has the smallest Euclidean distance in the logarithms of these
    numbers.

    If no case was measured, the function returns `fft` for families whose product stores little for the backward pass,
    such as LoRA (`StructuredMatrix.small_residuals`). For all other families it returns `dense`, which spends most of
    its time in dense matrix products.

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
    """Return the measured cases in `choice.json`.

    Returns:
        A dictionary from a triple (JAX backend, name of the family, dtype) to the list of the cases measured for it.
    """
    table: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for backend, measurement in json.loads(TABLE.read_text()).items():
        for row in measurement["fastest"]:
            table.setdefault((backend, row["family"], row["dtype"]), []).append(row)
    return table
