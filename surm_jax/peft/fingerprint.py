"""Find out whether the base model of an adapter has changed.

The base are the variables that the adapter neither adds nor trains. `fingerprint` makes digests, which are stored in
files. `checksums` makes cheaper sums on the device, which are kept in the `Adapter`.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, UInt32

from surm_jax.devices.processes import whole_on_host
from surm_jax.errors import UserError
from surm_jax.paths import join
from surm_jax.peft.adapter import Adapter
from surm_jax.peft.owners import owners
from surm_jax.peft.parts.base import AdapterConstant, AdapterParam, AdapterScale

_OTHERS = (AdapterParam, AdapterConstant, AdapterScale, nnx.RngState, nnx.Cache, nnx.Intermediate, nnx.Perturbation)

BASE = nnx.All(nnx.Variable, nnx.Not(nnx.Any(*_OTHERS)))
"""The NNX filter that selects the variables of the base model: parameters, and statistics such as running means.

Variables of adapters and the states of a call, such as random number generators and caches, do not belong to them.
"""


def fingerprint(frozen: nnx.State, kind: nnx.filterlib.Filter = BASE) -> dict[str, str]:
    """Return a dictionary from the path of each variable in a state to a digest of its exact value.

    A digest has 16 hexadecimal digits. It depends on the variable's path, shape, dtype and every bit of its value. The
    cost is that of computing the SHA-256 of all weights. With several JAX processes, the function is collective: all
    processes must call it, in the same order.

    Args:
        frozen: The state, such as that of all variables that an adapter does not train.
        kind: The NNX filter that selects the variables. The default selects those of the base model.
    """
    digests = {}
    for path, variable in nnx.to_flat_state(nnx.filter_state(frozen, kind)):
        array = whole_on_host(variable[...])
        digest = hashlib.sha256(f"{join(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        digests[join(path)] = digest.hexdigest()[:16]
    return digests


def check_fingerprint(actual: dict[str, str], expected: dict[str, str], what: str) -> None:
    """Check that a base model is the one that an adapter was trained on.

    Args:
        actual: The fingerprint of this base model.
        expected: The fingerprint of the base model that the adapter was trained on.
        what: The words that stand for the adapter in the message, such as "the adapter NAME".

    Raises:
        UserError: If the two fingerprints differ. The message names some of the parameters that differ.
    """
    problems = []
    if absent := sorted(expected.keys() - actual.keys()):
        problems.append(f"it lacks {_some(absent)}")
    if extra := sorted(actual.keys() - expected.keys()):
        problems.append(f"it also has {_some(extra)}")
    if changed := sorted(path for path in actual.keys() & expected.keys() if actual[path] != expected[path]):
        problems.append(f"other shapes or values in {_some(changed)}")
    if problems:
        raise UserError(f"the base model is not the one that {what} was trained on: {'; '.join(problems)}")


def _some(paths: list[str]) -> str:
    rest = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
    return ", ".join(paths[:4]) + rest


def base_variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Return the parameters and statistics of a model by path, without those of its adapters."""
    return {join(path): variable for path, variable in nnx.to_flat_state(nnx.state(model, BASE))}


def statistics(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Return the `base_variables` that are not parameters, such as running means of batch normalisation."""
    return {path: variable for path, variable in base_variables(model).items() if not isinstance(variable, nnx.Param)}


def checksums(model: nnx.Module, adapter: Adapter) -> dict[str, str] | None:
    """Return, for each frozen variable of the base, its shape and dtype and a sum over its bits, by path.

    The sums are computed on the device, which reads every array once. Equal arrays have equal sums for any sharding,
    and a change of a single entry always changes the sum. If the model is abstract or traced, the result is `None`.
    """
    state = nnx.to_flat_state(nnx.state(model, nnx.All(BASE, nnx.Not(adapter.trainable))))
    arrays = {join(path): jax.tree.leaves(variable.get_value()) for path, variable in state}
    leaves = [leaf for found in arrays.values() for leaf in found]
    if any(isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer) for leaf in leaves):
        return None
    sums = jax.device_get({path: [_checksum(leaf) for leaf in found] for path, found in arrays.items()})
    forms = {path: [f"{leaf.dtype}{leaf.shape}" for leaf in found] for path, found in arrays.items()}
    return {path: f"{forms[path]} {[int(total) for total in found]}" for path, found in sums.items()}


def frozen_checksums(model: nnx.Module, adapter: Adapter) -> dict[str, str] | None:
    """Return the `checksums` for a loaded adapter, without the variables that other adapters of the model trained.

    The loaded adapter was not trained with these. So it cannot be saved from a model that has them.
    """
    others = {path for path, owner in owners(model).items() if owner != adapter.name}
    sums = checksums(model, adapter)
    return sums and {path: total for path, total in sums.items() if path not in others}


@jax.jit
def _checksum(array: Array) -> UInt32[Array, ""]:
    """Return a checksum of an array's bits: the sum of all entries, read as integers and weighted, modulo 2 ** 32.

    The weight of an entry is an odd number that depends on its position.
    """
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if jnp.iscomplexobj(array):
        array = jnp.stack([array.real, array.imag])
    limits = jnp.finfo if jnp.issubdtype(array.dtype, jnp.floating) else jnp.iinfo
    if array.dtype == bool or limits(array.dtype).bits < 8:
        array = array.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}")).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        position = position * jnp.uint32(0x9E3779B1) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits * (position * jnp.uint32(0x85EBCA6B) | jnp.uint32(1)), dtype=jnp.uint32)


def moved_statistics(model: nnx.Module, adapter: Adapter) -> list[str]:
    """Return the paths of the statistics that training changed since the adapter was added.

    Raises:
        UserError: If a frozen parameter changed since, or belongs to another adapter that was added later.
    """
    owned, found = owners(model), statistics(model)
    own = [path for path in found if owned.get(path) == adapter.name]
    base, now = adapter.base, checksums(model, adapter)
    if base is None or now is None:
        return own
    changed = {path for path in now.keys() | base.keys() if now.get(path) != base.get(path)} - set(own)
    wrong = sorted(path for path in changed if path not in found or path in owned)
    if wrong:
        by = sorted({owned[path] for path in wrong if path in owned})
        raise UserError(
            f"the base model is no longer the one that got the adapter {adapter.name!r}: other values in {_some(wrong)}"
            + (f", trained by the adapter {by[0]!r}" if by else "")
            + ". Save the adapter with the frozen parameters that it was trained on, and give what it trains in `train`"
        )
    return sorted({*own, *changed})
