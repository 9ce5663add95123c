"""Fingerprints of frozen weights: an adapter belongs to the base that it was trained on."""

import hashlib

import numpy as np
from flax import nnx

from surm_jax.devices.processes import whole_on_host
from surm_jax.errors import UserError
from surm_jax.paths import join
from surm_jax.peft.parts.variables import AdapterParam

BASE = nnx.All(nnx.Param, nnx.Not(AdapterParam))
"""Parameters, those of adapters left out."""


def fingerprint(frozen: nnx.State, kind: nnx.filterlib.Filter = BASE) -> dict[str, str]:
    """Returns 16 hexadecimal digits for every variable of a kind in a state, by its path; of the base if not told.

    They depend on path, shape, dtype and every bit. Cost: one SHA-256 over the weights, one array after the other. Of
    several processes all must ask.
    """
    digests = {}
    for path, variable in nnx.to_flat_state(nnx.filter_state(frozen, kind)):
        array = whole_on_host(variable[...])
        digest = hashlib.sha256(f"{join(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        digests[join(path)] = digest.hexdigest()[:16]
    return digests


def check_fingerprint(actual: dict[str, str], expected: dict[str, str], what: str) -> None:
    """Checks that a base is the one that `what` was made with.

    Raises:
        UserError: naming the parameters that differ.
    """
    problems = []
    if absent := sorted(expected.keys() - actual.keys()):
        problems.append(f"it lacks {_some(absent)}")
    if extra := sorted(actual.keys() - expected.keys()):
        problems.append(f"it has besides {_some(extra)}")
    if changed := sorted(path for path in actual.keys() & expected.keys() if actual[path] != expected[path]):
        problems.append(f"other shapes or values in {_some(changed)}")
    if problems:
        raise UserError(f"the base model is not the one that {what} was trained on: {'; '.join(problems)}")


def _some(paths: list[str]) -> str:
    rest = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
    return ", ".join(paths[:4]) + rest
