"""Time a training step of ViT-B/16 (batch 8, 224 pixels, random weights) or of BERT-base with each method.

    python -m benchmarks.step [--out=FILE.json] [--methods=lora,circulant,full] [--model=vit] [--variant=B/16]
                              [--batch=8] [--dtype=float32] [--rounds=5] [--execution=auto] [--devices=1,2,4]

Every registered method is used with its default settings on its default modules (Q, K and V for updates), together with
a trained head. The whole step is timed: the forward pass, the backward pass and the update by AdamW. Times are compared
with two references. One is LoRA with r = 1. The other is called `frozen`: it computes the forward pass and the gradient
with respect to the images, and trains nothing; there is none for BERT. A sentence for BERT has 128 tokens.

`temp_bytes` is the temporary memory of the compiled program, and `peak_bytes` adds its arguments and results.
`optimizer_bytes` is the size of the state of AdamW.

With `--devices` every step is timed for each number of devices in the list, with the same batch split over the devices.
On a CPU the devices are simulated and share its cores.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from absl import flags
from flax import nnx

from benchmarks.timing import benchmark, device, medians, numbers, setting, table, write
from surm_jax.devices.mesh import make_mesh, put_base, put_batch, replicated
from surm_jax.errors import UserError
from surm_jax.models import TARGETS, Bert, BertConfig, ViT, ViTConfig
from surm_jax.peft import METHODS, Rule, Selection, adapt, make_method
from surm_jax.structured import EXECUTIONS
from surm_jax.tasks import Glue, ImageClassification
from surm_jax.tasks.objective import CLASSES, cross_entropy
from surm_jax.training.partition import partition
from surm_jax.training.step import init_state, make_train_step

METHOD_NAMES = flags.DEFINE_list("methods", None, "Methods to time; lora is always one of them. Default: all.")
MODEL = flags.DEFINE_enum("model", "vit", ["vit", "bert"], "The architecture.")
VARIANT = flags.DEFINE_string("variant", None, "Its size: B/16 for a ViT and base for a BERT, unless it is given.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of the activations and of the base.")
BATCH = flags.DEFINE_integer("batch", 8, "Images or sentences per step.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "How often each step is timed.", lower_bound=1)
DEVICES = flags.DEFINE_list("devices", ["1"], "Numbers of devices to split the batch over.")
EXECUTION = flags.DEFINE_enum("execution", "auto", EXECUTIONS, "How the updates are computed.")
NUM_CLASSES = 100
TOKENS = 128
COLUMNS = {
    "method": "",
    "devices": "",
    "parameters": ",",
    "ms": ".1f",
    "examples_per_s": ".1f",
    "ratio_to_frozen": ".3f",
    "ratio_to_lora": ".3f",
    "temp_bytes": ",",
    "optimizer_bytes": ",",
    "peak_bytes": ",",
}


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled training step.

    Attributes:
        compiled: The compiled program.
        run: Runs the program once, without arguments.
        parameters: The number of trained parameters.
        optimizer_bytes: The size of the optimiser's state in bytes.
    """

    compiled: Any
    run: Callable[[], Any]
    parameters: int = 0
    optimizer_bytes: int = 0


def make_model() -> ViT | Bert:
    """Return the model that the flags choose, with random weights.

    Raises:
        UserError: The architecture has no such variant.
    """
    options = {"num_classes": NUM_CLASSES, "dtype": DTYPE.value, "param_dtype": DTYPE.value}
    if MODEL.value == "vit":
        return ViT(ViTConfig.from_variant(VARIANT.value or "B/16", **options), rngs=nnx.Rngs(0))
    return Bert(BertConfig.from_variant(VARIANT.value or "base", **options), rngs=nnx.Rngs(0))


def random_batch(model: ViT | Bert, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Return a batch of random images or sentences with labels, split over the devices of a mesh."""
    config, rng = model.config, np.random.default_rng(0)
    batch = {"label": rng.integers(NUM_CLASSES, size=BATCH.value).astype(np.int32)}
    if isinstance(model, ViT):
        shape = (BATCH.value, config.image_size, config.image_size, config.channels)
        batch["image"] = rng.normal(size=shape).astype(np.float32)
    else:
        batch["tokens"] = rng.integers(config.vocab_size, size=(BATCH.value, TOKENS)).astype(np.int32)
        batch |= {"token_types": np.zeros_like(batch["tokens"]), "token_mask": np.ones(batch["tokens"].shape, bool)}
    return put_batch(batch, mesh)


def frozen_step(model: ViT, mesh: jax.sharding.Mesh) -> Step:
    """Return the reference that trains nothing.

    It computes the forward pass, and the gradient of the loss with respect to the images.
    """
    graphdef, state = nnx.split(model)
    state, batch = put_base(state, mesh), random_batch(model, mesh)

    def loss(image: jax.Array, state: nnx.State, label: jax.Array) -> jax.Array:
        return cross_entropy(nnx.merge(graphdef, state)(image), label).mean()

    compiled = jax.jit(jax.value_and_grad(loss)).lower(batch["image"], state, batch["label"]).compile()
    return Step(compiled, functools.partial(compiled, batch["image"], state, batch["label"]))


def method_step(model: ViT | Bert, name: str, mesh: jax.sharding.Mesh) -> Step:
    """Return the training step of a method with its default settings, including the update by AdamW.

    Args:
        model: The pretrained model.
        name: The name of the method.
        mesh: The devices.

    Raises:
        UserError: The method cannot adapt the model.
    """
    method = make_method(name, {})
    if isinstance(method, Selection):
        rules, train = [], ["head/.*", *method.patterns]
    else:
        rules, train = [Rule(TARGETS[method.target], method)], ["head/.*"]
    adapted, adapter = adapt(model, rules, train=train, execution=EXECUTION.value, rngs=nnx.Rngs(1))
    parts, trained, frozen = partition(adapted, adapter)
    optimizer = optax.adamw(1e-4)
    state, batch = init_state(trained, optimizer, mesh), random_batch(model, mesh)
    frozen = put_base(frozen, mesh)
    task = ImageClassification if isinstance(model, ViT) else Glue
    step = make_train_step(parts, task.forward, CLASSES, optimizer, mesh)
    key = jax.device_put(jax.random.key(0), replicated(mesh))
    compiled = step.lower(state, frozen, batch, key, {}).compile()
    optimizer_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.optimizer))

    def program() -> jax.Array:
        # The step donates the buffers of its state, so each call must start from the state that the last call returned.
        nonlocal state
        state, metrics = compiled(state, frozen, batch, key, {})
        return metrics["train_loss"]

    return Step(compiled, program, sum(array.size for array in trained.values()), optimizer_bytes)


def row_of(name: str, devices: int, step: Step) -> dict[str, Any]:
    """Return the row of results for a step, without its times. Sizes in bytes are measured on one device."""
    memory = step.compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "method": name,
        "devices": devices,
        "execution": EXECUTION.value if step.parameters else "frozen",
        "model": described(),
        "batch": BATCH.value,
        "dtype": DTYPE.value,
        **setting(),
        "parameters": step.parameters,
        "temp_bytes": memory.temp_size_in_bytes,
        "optimizer_bytes": step.optimizer_bytes,
        "peak_bytes": memory.temp_size_in_bytes + held,
    }


def described() -> str:
    """Return the name of the model that the flags choose, such as "ViT-B/16"."""
    return f"ViT-{VARIANT.value or 'B/16'}" if MODEL.value == "vit" else f"BERT-{VARIANT.value or 'base'}"


def main() -> None:
    """Time all steps, print a table of the results, and write them as rows to the file of `--out`."""
    names = list(dict.fromkeys(["lora", *(METHOD_NAMES.value or METHODS)]))
    unknown = set(names) - set(METHODS)
    if unknown:
        raise UserError(f"unknown methods {', '.join(sorted(unknown))}; known: {', '.join(METHODS)}")
    counts = numbers(DEVICES)
    # This has to be set before JAX initialises its devices. It changes only the number of (simulated) CPU devices.
    jax.config.update("jax_num_cpu_devices", max(counts))
    try:
        meshes = {count: make_mesh(count, {"--batch": BATCH.value}) for count in counts}
    except UserError as error:
        raise UserError(f"--devices={','.join(DEVICES.value)}: {error}") from None
    rows, programs = [], {}
    for count, mesh in meshes.items():
        with jax.set_mesh(mesh):
            model = make_model()
            for name in ["frozen", *names] if isinstance(model, ViT) else names:
                print(f"compiling {name} for {count} devices", flush=True)
                try:
                    step = frozen_step(model, mesh) if name == "frozen" else method_step(model, name, mesh)
                except UserError as error:
                    raise UserError(f"--methods={name}, {described()}: {error}") from None
                programs[name, count] = step.run
                rows.append(row_of(name, count, step))
    times = medians(programs, ROUNDS.value)
    for row in rows:
        seconds = times[row["method"], row["devices"]]
        row["ms"], row["examples_per_s"] = 1e3 * seconds, BATCH.value / seconds
        if MODEL.value == "vit":
            row["ratio_to_frozen"] = seconds / times["frozen", row["devices"]]
        row["ratio_to_lora"] = seconds / times["lora", row["devices"]]
    print(f"{described()}, batch {BATCH.value}, {DTYPE.value}, on {device()}, jax {jax.__version__}")
    print(table(rows, COLUMNS))
    write(rows)


if __name__ == "__main__":
    benchmark(main)
