"""Writes docs/methods.md: every registered method, what it is, its settings and how many numbers it trains.

python -m docs.list_methods
"""

import argparse
import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path

from flax import nnx

from surm_jax.models import TARGETS, Bert, BertConfig, ViT, ViTConfig
from surm_jax.peft import METHODS, Bottleneck, Method, Rule, Selection, Update, adapt, describe

OUT = Path(__file__).resolve().parent / "methods.md"
HEAD = """# Methods

Every method by its name in `--config.peft.method=` and in `surm_jax.make_method(name, settings)`. Written by
`python -m docs.list_methods`, which also counts: numbers trained on ViT-B/16 and on BERT-base at the settings shown, on
the modules that the method is meant for, without the head.

Settings are given as `--config.peft.<method>.<setting>=`, the modules as `--config.peft.target=`: a regular expression
for whole module paths, or one of the presets {presets}. Rules of their own for
some modules stand in `config.peft.rules` (`surm_jax/training/config.py`, `RuleConfig`), first match wins; from Python
they are a list of `surm_jax.Rule`. A rule that matches nothing is an error.

Learning rates do not carry over from one method to another: each has its own convention for the scale of its matrix,
and a C3A, for one, is divided by the number of input features. A starting point for a search is in
`config.optim.learning_rate.<method>`.
"""
KINDS = {
    Update: "Updates: a structured matrix beside the kernels of linear layers",
    Bottleneck: "Adapters: a branch added to the output of modules",
    Selection: "Selections: a part of the model itself",
}


def row(name: str, method: type[Method], models: dict[str, nnx.Module]) -> str:
    """A line of the table."""
    instance = method()
    counts = []
    for model in models.values():
        if isinstance(instance, Selection):
            adapted, adapter = adapt(model, [], train=instance.patterns, rngs=nnx.Rngs(0))
        else:
            adapted, adapter = adapt(model, [Rule(TARGETS[instance.target], instance)], rngs=nnx.Rngs(0))
        rows = describe(adapted, adapter).rows
        counts.append(f"{sum(r.trainable for r in rows if not r.path.startswith('head/')):,}")
    settings = ", ".join(f"`{field.name}={getattr(instance, field.name)}`" for field in dataclasses.fields(instance))
    what = " ".join(inspect.getdoc(method).split("\n\n")[0].split()).replace("|", "\\|")
    target = f"`{instance.target}`" if instance.target else ""
    return f"| `{name}` | {what} | {settings} | {target} | {' | '.join(counts)} |"


def page() -> str:
    """Returns the page."""
    vit = ViTConfig.from_variant("B/16", num_classes=10)
    bert = BertConfig.from_variant("base", num_classes=2)
    models = {
        "ViT-B/16": nnx.eval_shape(lambda: ViT(vit, rngs=nnx.Rngs(0))),
        "BERT-base": nnx.eval_shape(lambda: Bert(bert, rngs=nnx.Rngs(0))),
    }
    parts = [HEAD.format(presets=", ".join(f"`{name}`" for name in TARGETS))]
    for kind, title in KINDS.items():
        lines = [f"| method | what | settings | on | {' | '.join(models)} |", "|---|---|---|---|---:|---:|"]
        lines += [row(name, method, models) for name, method in METHODS.items() if issubclass(method, kind)]
        parts.append(f"## {title}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the page."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args(arguments)
    OUT.write_text(page())


if __name__ == "__main__":
    main()
