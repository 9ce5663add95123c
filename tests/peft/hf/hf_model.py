"""A small model that stands for a transformers model, and functions that write adapter folders for it."""

import json

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from surm_jax.peft import Rule, adapt, iter_parts, save_peft
from surm_jax.peft.hf import ModuleNames
from surm_jax.pretrained.hf.architecture import CONV, EMBEDDING, LINEAR, LINEAR_OUT, NORM
from tests.peft.models import CONFIG, TENSORS, materialize, perturb


class Model(nnx.Module):
    """A model with every kind of module that an adapter folder may name. `outer` contains a module and a parameter."""

    def __init__(self, *, rngs):
        self.blocks = nnx.List(
            [
                nnx.Dict(
                    query=nnx.LinearGeneral(6, (2, 3), rngs=rngs),
                    out=nnx.LinearGeneral((2, 3), 6, axis=(-2, -1), use_bias=False, rngs=rngs),
                    up=nnx.Linear(6, 9, rngs=rngs),
                    norm=nnx.LayerNorm(6, rngs=rngs),
                )
                for _ in range(2)
            ]
        )
        self.embed = nnx.Embed(5, 6, rngs=rngs)
        self.conv = nnx.Conv(2, 6, (3, 3), rngs=rngs)
        self.outer = nnx.Dict(inner=nnx.Linear(6, 6, rngs=rngs), bias=nnx.Param(jnp.zeros(6)))
        self.token = nnx.Param(jnp.zeros((1, 6)))
        self.nameless = nnx.Linear(6, 6, rngs=rngs)
        self.head = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block.norm(x + block.out(jnp.tanh(block.query(x))) + jnp.tanh(block.up(x))[..., :6])
        return self.head(self.outer.inner(x) + self.nameless(x))


LAYOUTS = {"query": LINEAR, "out": LINEAR_OUT, "up": LINEAR, "norm": NORM}
MODULES = {
    **{
        f"blocks/{i}/{part}": (layout, f"net.layers.{i}.{part}_proj", f"net.encoder.{i}.{part}")
        for i in range(2)
        for part, layout in LAYOUTS.items()
    },
    "embed": (EMBEDDING, "net.embed"),
    "conv": (CONV, "net.conv"),
    "outer": ((LINEAR[1],), "net.outer"),
    "outer/inner": (LINEAR, "net.outer.inner"),
    "head": (LINEAR, "classifier"),
}


class Names(ModuleNames):
    """The names of modules, as transformers gives them. Each module in a block has two alternative names."""

    def modules(self, path):
        return MODULES[path][1:] if path in MODULES else ()

    def tensor(self, path):
        module, _, part = path.rpartition("/")
        layout = next(layout for layout in MODULES[module][0] if layout.ours == part)
        return f"{MODULES[module][-1]}.{layout.theirs}", layout


NAMES = Names()


def make():
    return materialize(lambda: Model(rngs=nnx.Rngs(0)))


def trained(*rules, train=()):
    """Return an adapted model and its adapter, with noise added to the trained variables, as if after training."""
    model, adapter = adapt(make(), [Rule(*rule) for rule in rules], train=train, rngs=nnx.Rngs(1))
    return perturb(model, adapter), adapter


def saved(folder, *rules, train=()):
    """Save an adapter in peft's format. Return the adapted model, and the settings and tensors in the folder."""
    model, adapter = trained(*rules, train=train)
    save_peft(folder, model, adapter, NAMES)
    return model, json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)


def foreign(folder, settings, tensors):
    """Write settings and tensors to an adapter folder as peft does, and return the folder."""
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(settings))
    save_file({f"base_model.model.{name}": np.ascontiguousarray(array) for name, array in tensors.items()},
              folder / TENSORS)  # fmt: skip
    return folder


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dense(model):
    """Return the matrix (in, out) that is added to the kernel of each adapted layer, by the path of the layer."""
    return {path: np.asarray(part.matrix().to_dense()) for path, _, part, _ in iter_parts(model)}


def lora(folder, *, rank=2, modules=("net.layers.0.up_proj",), shape=(6, 9), **settings):
    """Write an adapter folder of peft with LoRA on some modules, which all have the same matrices A and B.

    Return the folder, A and B.
    """
    A, B = normal(rank, shape[0]), normal(shape[1], rank, seed=1)
    tensors = {}
    for module in modules:
        tensors |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "target_modules": list(modules)} | settings
    return foreign(folder, settings, tensors), A, B
