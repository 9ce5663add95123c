"""What a configuration puts into a model, and what that trains."""

import functools
from collections.abc import Callable, Sequence

import jax
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.models import HEAD
from surm_jax.paths import join
from surm_jax.peft import Adapter, Description, Rule, Selection, adapt, describe, make_method
from surm_jax.training.config import PeftConfig, RunConfig


def describe_model(config: RunConfig, make_model: Callable[[int], nnx.Module]) -> Description:
    """Says what a configuration trains, without weights or data.

    Args:
        config: the whole configuration.
        make_model: builds the model from a seed; called only while JAX traces.

    Raises:
        UserError: if a rule or pattern matches nothing, or a layer that cannot be adapted.
    """
    model, adapter = adapt_model(nnx.eval_shape(functools.partial(make_model, 0)), config.peft, 0)
    _, trained, _ = nnx.split(model, adapter.trainable, ...)
    for path, variable in nnx.to_flat_state(trained):
        if variable.dtype != "float32":
            raise UserError(
                f"{join(path)} would be trained in {variable.dtype}, which loses small steps: leave"
                " config.model.param_dtype at float32, or train adapters alone"
            )
    description = describe(model, adapter)
    if not description.trainable:
        raise UserError(f"nothing would be trained: config.peft.train is empty, and {config.peft.method} adds nothing")
    return description


def adapt_model(model: nnx.Module, peft: PeftConfig, seed: int) -> tuple[nnx.Module, Adapter]:
    """Returns a model with what the configuration puts into it, and its adapter.

    Raises:
        UserError: if a rule or pattern matches nothing, or a layer that cannot be adapted.
    """
    # Not the stream that drew the model: its first keys would come again.
    rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(seed), 1))
    rules, train = rules_of(peft, model.config.new_head)
    return adapt(model, rules, train=train, execution=peft.execution, rngs=rngs)


def rules_of(peft: PeftConfig, new_head: Sequence[str]) -> tuple[list[Rule], tuple[str, ...]]:
    """Returns the rules of a configuration, and the patterns of what is trained besides.

    Where that is the head, it is all of it that a new task begins with anew: of RoBERTa two layers.
    """
    trained = [part for pattern in peft.train for part in (pattern, *(new_head if (pattern,) == HEAD else ()))]
    train = tuple(dict.fromkeys(trained))
    rules = [
        Rule(r.target, make_method(r.method, dict(r.settings)) if r.method else None, r.parts, r.which)
        for r in peft.rules
    ]
    method = peft.methods[peft.method]
    if isinstance(method, Selection):
        if peft.target not in ("", "none"):
            raise UserError(
                f"config.peft.target={peft.target}, but {peft.method} trains parameters of the model by patterns of its"
                " own: leave target empty"
            )
        return rules, (*train, *method.patterns)
    if peft.target != "none":
        rules.append(Rule(peft.target or method.target, method))
    return rules, train
