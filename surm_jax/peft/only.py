"""Make trainers of other libraries, which select what they train by its type, train one adapter and nothing else."""

import collections

from flax import nnx

from surm_jax.peft.adapter import Adapter
from surm_jax.peft.lifecycle import parts_of
from surm_jax.peft.parts.base import AdapterConstant, AdapterParam


class TrainedParam(nnx.LoRAParam):
    """A parameter of the base model, such as that of a head, that an adapter trains."""


def only(model: nnx.Module, adapter: Adapter) -> nnx.Module:
    """Return a copy of a model in which the type `nnx.LoRAParam` selects what an adapter trains, and nothing else.

    Trainers of other libraries, such as `PeftTrainer` of tunix, train all variables of this type. The parameters that
    `adapt` adds have it, so that these trainers train an adapter that has no patterns in `train` and is the only one in
    its model. Otherwise they would leave out a trained head, and also train other adapters and other LoRA layers. In
    the copy, the head has the type, and the others do not. The copy can be saved, and merged.

    >>> import surm_jax
    >>> model = nnx.Dict(body=nnx.Linear(4, 4, rngs=nnx.Rngs(0)), head=nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    >>> rules = [surm_jax.Rule("body", surm_jax.CirculantUpdate())]
    >>> model, adapter = surm_jax.adapt(model, rules, train=["head/.*"], rngs=nnx.Rngs(2))
    >>> [len(nnx.to_flat_state(nnx.state(m, nnx.LoRAParam))) for m in (model, only(model, adapter))]
    [2, 4]

    Args:
        model: An adapted model.
        adapter: The adapter to train. Other adapters of the model are frozen, and still act.

    Raises:
        UserError: If the model does not have the adapter.
    """
    parts_of(model, adapter)
    model = nnx.clone(model)
    kinds: dict[type, type] = collections.defaultdict(lambda: nnx.Param)
    kinds[AdapterParam] = AdapterConstant
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        trained, lora = adapter.trainable(path, variable), isinstance(variable, nnx.LoRAParam)
        if trained and not lora:
            _set_type(variable, TrainedParam)
        elif lora and not trained:
            _set_type(variable, kinds[type(variable)])
    return model


def _set_type(variable: nnx.Variable, kind: type[nnx.Variable]) -> None:
    # Layers may share the variable, so that it cannot be replaced by a new one.
    object.__setattr__(variable, "__class__", kind)
