"""A training step of ViT-B/16 (batch 8, 224 pixels, random weights) with each family on Q, K and V.

    python -m benchmarks.step [--out=FILE.json] [--families=circulant] [--variant=B/16] [--batch=8] [--rounds=5]
                              [--execution=auto]

The whole step is timed: forward, backward, AdamW on the updates and the head. Beside the families stand LoRA r = 1
(`low_rank`) and as a reference `frozen`: forward and the gradient of the image, with nothing trained. `peak_bytes`
is what the compiled program holds of arguments, results and temporaries together.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx

from benchmarks.layer import VARIANTS, check_sizes
from benchmarks.timing import device, medians, setting, table
from surm_jax.errors import UserError
from surm_jax.models import ViT, ViTConfig
from surm_jax.models.vit import TARGETS
from surm_jax.paths import compile_pattern, join
from surm_jax.peft import Adapter
from surm_jax.peft.delta import Delta, attach
from surm_jax.structured import EXECUTIONS, FAMILIES
from surm_jax.training.mesh import make_mesh
from surm_jax.training.partition import partition
from surm_jax.training.step import cross_entropy, init_state, make_train_step

OUT = flags.DEFINE_string("out", None, "Write the rows as JSON to this file.")
FAMILY_NAMES = flags.DEFINE_list("families", None, "Families to time beside low_rank; all of them by default.")
VARIANT = flags.DEFINE_string("variant", "B/16", "The ViT.")
BATCH = flags.DEFINE_integer("batch", 8, "Images per step.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "How often each step is timed.", lower_bound=1)
EXECUTION = flags.DEFINE_enum("execution", "auto", EXECUTIONS, "How the updates are computed.")
CLASSES = 100
COLUMNS = {
    "family": "",
    "parameters": ",",
    "ms": ".1f",
    "ratio_to_frozen": ".3f",
    "ratio_to_lora": ".3f",
    "temp_bytes": ",",
    "peak_bytes": ",",
}


def base_model() -> ViT:
    """A ViT with random weights."""
    return ViT(ViTConfig.from_variant(VARIANT.value, num_classes=CLASSES), rngs=nnx.Rngs(0))


def images_and_labels(model: ViT) -> dict[str, jax.Array]:
    """A batch of noise."""
    config, rng = model.config, np.random.default_rng(0)
    shape = (BATCH.value, config.image_size, config.image_size, config.channels)
    return {
        "image": jnp.asarray(rng.normal(size=shape), jnp.float32),
        "label": jnp.asarray(rng.integers(CLASSES, size=BATCH.value), jnp.int32),
    }


def frozen_step(model: ViT) -> tuple[Any, Callable[[], Any], int]:
    """The reference: forward, and the gradient of the loss by the images."""
    graphdef, state = nnx.split(model)
    batch = images_and_labels(model)

    def loss(image: jax.Array, state: nnx.State, label: jax.Array) -> jax.Array:
        return cross_entropy(nnx.merge(graphdef, state)(image), label).mean()

    compiled = jax.jit(jax.value_and_grad(loss)).lower(batch["image"], state, batch["label"]).compile()
    return compiled, functools.partial(compiled, batch["image"], state, batch["label"]), 0


def adapted_step(
    model: ViT, family: str, options: dict[str, Any], mesh: jax.sharding.Mesh
) -> tuple[Any, Callable[[], Any], int]:
    """The training step with a family's updates on Q, K and V, and the number of trained parameters."""
    batch = images_and_labels(model)
    model = nnx.clone(model)
    rngs = nnx.Rngs(1)
    pattern = compile_pattern(TARGETS["qkv"])
    for path, layer in list(nnx.iter_modules(model)):
        if pattern.fullmatch(join(path)):
            width = model.config.width
            matrix = FAMILIES[family].init(rngs.params(), (width, width), scale=1.0, **options)
            attach(layer, Delta(matrix, 1.0, EXECUTION.value))
    parts, trained, frozen = partition(model, Adapter((), ("head/.*",)))
    optimizer = optax.adamw(1e-4)
    state = init_state(trained, optimizer, mesh)
    compiled = make_train_step(parts, optimizer, mesh, seed=0).lower(state, frozen, batch).compile()

    def program() -> jax.Array:
        # The step takes over the memory of the state, so that each call goes on from the last one.
        nonlocal state
        state, metrics = compiled(state, frozen, batch)
        return metrics["train_loss"]

    return compiled, program, sum(array.size for array in trained.values())


def main(_: list[str]) -> None:
    """Times all steps, prints a table and writes the file asked for."""
    families = list(dict.fromkeys(["low_rank", *(FAMILY_NAMES.value or FAMILIES)]))
    unknown = set(families) - set(FAMILIES)
    if unknown:
        raise app.UsageError(f"unknown families {', '.join(sorted(unknown))}; known: {', '.join(FAMILIES)}")
    try:
        check_sizes(families, ViTConfig.from_variant(VARIANT.value, num_classes=CLASSES).width)
    except UserError as error:
        raise app.UsageError(f"--variant={VARIANT.value}: {error}") from None
    mesh = make_mesh(1, {})
    rows, programs = [], {}
    with jax.set_mesh(mesh):
        model = base_model()
        for family in ["frozen", *families]:
            print(f"compiling {family}", flush=True)
            if family == "frozen":
                compiled, program, parameters = frozen_step(model)
            else:
                compiled, program, parameters = adapted_step(model, family, VARIANTS.get(family, ({},))[0], mesh)
            memory = compiled.memory_analysis()
            programs[family] = program
            held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            rows.append(
                {
                    "family": family,
                    "execution": EXECUTION.value if parameters else "frozen",
                    "model": f"ViT-{VARIANT.value}",
                    "batch": BATCH.value,
                    **setting(),
                    "parameters": parameters,
                    "temp_bytes": memory.temp_size_in_bytes,
                    "peak_bytes": memory.temp_size_in_bytes + held,
                }
            )
        times = medians(programs, ROUNDS.value)
    for row in rows:
        seconds = times[row["family"]]
        row["ms"] = 1e3 * seconds
        row["ratio_to_frozen"], row["ratio_to_lora"] = seconds / times["frozen"], seconds / times["low_rank"]
    print(f"ViT-{VARIANT.value}, batch {BATCH.value}, float32, on {device()}, jax {jax.__version__}")
    print(table(rows, COLUMNS))
    if OUT.value:
        Path(OUT.value).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
