"""Remember which adapter trained which variable of the base model.

Several adapters can add something to one layer, but a variable of the base model, such as the kernel of the head, has
one value. The adapter that trains it is its owner. Its name is stored in the variable's metadata, and a second adapter
that trains the same variable is refused.
"""

from collections.abc import Iterable, Mapping

from flax import nnx

from surm_jax.errors import UserError
from surm_jax.paths import join
from surm_jax.peft.parts.base import iter_parts

_OWNER = "trained_by"


def owners(model: nnx.Module) -> dict[str, str]:
    """Return a dictionary from the path of each variable that belongs to an adapter to the name of this adapter."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Variable))
    return {join(path): variable.get_metadata(_OWNER) for path, variable in state if variable.has_metadata(_OWNER)}


def adapter_names(model: nnx.Module) -> tuple[str, ...]:
    """Return the sorted names of a model's adapters."""
    return tuple(sorted({row.name for row in iter_parts(model)} | set(owners(model).values())))


def claim(variables: Mapping[str, nnx.Variable], paths: Iterable[str], name: str) -> None:
    """Make an adapter the owner of the variables at some paths, in place.

    Args:
        variables: Variables by path.
        paths: The paths of those that the adapter trains.
        name: The name of the adapter.

    Raises:
        UserError: If another adapter owns one of them.
    """
    for path in paths:
        variable = variables[path]
        if variable.has_metadata(_OWNER):
            raise UserError(
                f"the adapter {name!r} trains {path}, which the adapter {variable.get_metadata(_OWNER)!r} of the model"
                " trains too: load each of them on the base model by itself (the copies share its arrays), or serve"
                " them together with load_bank"
            )
        variable.set_metadata(_OWNER, name)


def release(model: nnx.Module, names: Iterable[str]) -> None:
    """Free all variables that some adapters own, in place. The variables keep their values."""
    released = set(names)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Variable)):
        if variable.has_metadata(_OWNER) and variable.get_metadata(_OWNER) in released:
            variable.del_metadata(_OWNER)
