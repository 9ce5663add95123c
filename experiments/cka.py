"""Measure how similarly two networks represent the same examples, by the linear CKA of their hidden states."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import tqdm
from flax import nnx
from jaxtyping import Array, ArrayLike, Float

from experiments.runs import Run
from experiments.tables import markdown
from surm_jax.devices.mesh import put_batch
from surm_jax.errors import UserError
from surm_jax.training.setup import Job


def linear_cka(x: Float[ArrayLike, "examples d1"], y: Float[ArrayLike, "examples d2"]) -> float:
    """Return the linear centred kernel alignment (CKA) of two representations, from 0 to 1.

    It is `|Y^T X|^2 / (|X^T X| |Y^T Y|)` where `| |` is the Frobenius norm, and X and Y are the representations with
    the mean of each column subtracted (Kornblith et al. 2019, arXiv 1905.00414). Rotating, shifting or scaling a
    representation does not change the value, but other linear maps do. It is computed in float64. The product `Y^T X`
    costs O(examples d1 d2), and the (examples, examples) Gram matrices of the definition are never formed.

    Args:
        x: The first representation, (examples, d1), of any real dtype.
        y: The second representation, (examples, d2), of the same examples in the same order.

    Raises:
        UserError: The representations have different numbers of examples. Or one of them does not have two dimensions,
            holds values that are not finite, or has the same row for all examples, which would make the CKA 0 / 0.

    In this example the second representation has the columns of the first in reverse order, scaled and shifted, so the
    CKA is 1. The two columns by themselves are uncorrelated, so their CKA is 0.

    >>> points = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> round(linear_cka(points, 3 * points[:, ::-1] + 1), 6)
    1.0
    >>> round(linear_cka(points[:, :1], points[:, 1:]), 6)
    0.0
    """
    x, y = _centred("the first", x), _centred("the second", y)
    if len(x) != len(y):
        raise UserError(f"linear_cka: both representations must be of the same examples, not of {len(x)} and {len(y)}")
    cross, own_x, own_y = (np.linalg.norm(product) for product in (y.T @ x, x.T @ x, y.T @ y))
    return float(cross**2 / (own_x * own_y))


def _centred(which: str, values: ArrayLike) -> Float[np.ndarray, "examples d"]:
    """Check a representation, and return it in float64 with the mean of each column subtracted."""
    values = np.asarray(values, np.float64)
    if values.ndim != 2:
        raise UserError(f"linear_cka: {which} representation must be a matrix (examples, d), not {values.shape}")
    if not np.isfinite(values).all():
        raise UserError(f"linear_cka: {which} representation holds numbers that are not finite")
    if (values == values[:1]).all():
        raise UserError(f"linear_cka: {which} representation is the same for all {len(values)} examples")
    return values - values.mean(axis=0)


@partial(jax.jit, static_argnums=0)
def _states(graphdef: nnx.GraphDef, state: nnx.State, batch: dict[str, Array]) -> tuple[Float[Array, "b t d"], ...]:
    model = nnx.merge(graphdef, state)
    if "image" in batch:
        return model.hidden_states(batch["image"])
    return model.hidden_states(batch["tokens"], mask=batch["token_mask"], token_types=batch["token_types"])


def hidden_states(
    job: Job, model: nnx.Module, batches: Iterable[dict[str, np.ndarray]]
) -> list[Float[np.ndarray, "tokens d"]]:
    """Return the hidden states of a model: the input of its first block, and the output of each block.

    Args:
        job: The job, whose mesh of devices is used.
        model: The model.
        batches: The batches of examples.

    Returns:
        For each hidden state, an array with a row for each token of all examples, (tokens, width). Padding tokens, and
        the examples that fill up the last batch, are left out.
    """
    graphdef, state = nnx.split(model)
    by_layer = []
    with jax.set_mesh(job.mesh):
        for batch in batches:
            states = [np.asarray(one, np.float32) for one in _states(graphdef, state, put_batch(batch, job.mesh))]
            kept = np.broadcast_to(batch["mask"][:, None], states[0].shape[:2]) & batch.get("token_mask", True)
            by_layer.append([one[kept] for one in states])
    return [np.concatenate(parts) for parts in zip(*by_layer, strict=True)]


class Alike(NamedTuple):
    """How similar hidden states are to those of a fully fine-tuned network, at one depth.

    Attributes:
        blocks: The number of blocks that the hidden states have passed through. It is 0 for the input of the first
            block.
        run: The linear CKA of the run's model with the fully fine-tuned network.
        base: The linear CKA of the pretrained model with the fully fine-tuned network.
    """

    blocks: int
    run: float
    base: float


def compare(run: Run, full: nnx.Module, examples: int) -> list[Alike]:
    """Compare the hidden states of a run's models with those of a fully fine-tuned network.

    Both the pretrained and the fine-tuned model are compared, before the first block and after every block.

    Args:
        run: The run, with its pretrained and its fine-tuned model.
        full: The fully fine-tuned network.
        examples: The number of test examples to use, at least. Whole batches are used, which are spread evenly over the
            test set.
    """
    batches = run.job.task.eval_batches(run.job.task.tests[0])
    every = max(1, len(batches) // -(-examples // run.job.config.data.eval_batch_size))
    chosen, seen = [], 0
    for place, batch in enumerate(batches):
        if place % every == 0 and seen < examples:
            chosen.append(batch)
            seen += int(batch["mask"].sum())
    wanted = hidden_states(run.job, full, chosen)
    rows = {}
    for name, model in (("run", run.tuned), ("base", run.base)):
        states = hidden_states(run.job, model, chosen)
        pairs = tqdm.tqdm(zip(states, wanted, strict=True), desc=f"CKA, {name}", total=len(wanted), unit="layer")
        rows[name] = [linear_cka(*pair) for pair in pairs]
    return [Alike(blocks, *pair) for blocks, pair in enumerate(zip(rows["run"], rows["base"], strict=True))]


def alike_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a markdown table of CKA from the rows of a csv file, with the fields of `Alike` as columns."""
    lines = [
        {"states after": f"{row['blocks']} blocks", "this run": float(row["run"]), "pretrained": float(row["base"])}
        for row in rows
    ]
    return markdown(lines, {"states after": "", "this run": ".4f", "pretrained": ".4f"})
