"""Make the tables of `docs/methods.md`: every registered method, its settings and its number of trained parameters."""

import dataclasses
import inspect

from flax import nnx

from experiments.tables import markdown
from surm_jax.models import TARGETS, Bert, BertConfig, ViT, ViTConfig
from surm_jax.peft import METHODS, Branch, Method, Rule, Selection, Update, adapt, describe

KINDS = {"updates": Update, "adapters": Branch, "selections": Selection}


def models() -> dict[str, nnx.Module]:
    """Return the models whose trained parameters the tables count, as abstract modules without allocated arrays."""
    vit = ViTConfig.from_variant("B/16", num_classes=10)
    bert = BertConfig.from_variant("base", num_classes=2)
    return {
        "ViT-B/16": nnx.eval_shape(lambda: ViT(vit, rngs=nnx.Rngs(0))),
        "BERT-base": nnx.eval_shape(lambda: Bert(bert, rngs=nnx.Rngs(0))),
    }


def count(model: nnx.Module, method: Method) -> int:
    """Return how many parameters a method trains in a model on its default modules, without the head."""
    if isinstance(method, Selection):
        adapted, adapter = adapt(model, [], train=method.patterns, rngs=nnx.Rngs(0))
    else:
        adapted, adapter = adapt(model, [Rule(TARGETS[method.target], method)], rngs=nnx.Rngs(0))
    return sum(row.trainable for row in describe(adapted, adapter).rows if not row.path.startswith("head/"))


def tables() -> dict[str, str]:
    """Return three markdown tables of methods: "updates", "adapters" and "selections"."""
    counted, found = models(), {}
    for title, kind in KINDS.items():
        rows = []
        for name, cls in METHODS.items():
            if issubclass(cls, kind):
                method = cls()
                fields = dataclasses.fields(method)
                row = {
                    "method": f"`{name}`",
                    "what": " ".join(inspect.getdoc(cls).split("\n\n")[0].split()).replace("|", "\\|"),
                    "settings": ", ".join(f"`{field.name}={getattr(method, field.name)}`" for field in fields),
                    "on": f"`{method.target}`" if method.target else "",
                }
                rows.append(row | {model: count(one, method) for model, one in counted.items()})
        columns = dict.fromkeys(("method", "what", "settings", "on"), "")
        found[title] = markdown(rows, columns | dict.fromkeys(counted, ","))
    return found
