"""Writes docs/scale.md: what a run takes of memory, network and time on 1 to 2,048 chips, by formulas, and their check.

    python -m benchmarks.scale

The formulas are below and in the page. What they say of arguments and collectives is compared with programs that are
compiled for eight simulated devices. Times are expectations: no such machine was measured.
"""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.hlo import collectives
from benchmarks.report import markdown
from surm_jax.models import TARGETS, ViT, ViTConfig
from surm_jax.peft import Rule, Selection, adapt, make_method
from surm_jax.training.image_task import ImageTask
from surm_jax.training.mesh import batch_sharding, make_mesh, put_base
from surm_jax.training.objective import CLASSES
from surm_jax.training.partition import partition
from surm_jax.training.step import init_state, make_train_step

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scale.md"
COUNTS = (1, 8, 256, 2048)
# Share of the peak that a chip reaches in the products of a transformer: assumed, not measured.
UTILISATION = 0.4


@dataclasses.dataclass(frozen=True)
class Model:
    """A transformer, and the work that one chip gets in a step.

    Attributes:
      width: features of the residual stream.
      depth: blocks.
      mlp_width: features inside the MLP.
      mlp_kernels: its kernels: two, or three with a gate.
      heads: of attention.
      vectors: numbers of a block's biases and norms.
      outside: numbers outside the blocks.
      outputs: outputs for every token, 0 where an example has a single row of logits.
      sequence: tokens of an example.
      batch: examples per chip and step.
    """

    width: int
    depth: int
    mlp_width: int
    heads: int
    vectors: int
    outside: int
    sequence: int
    batch: int
    mlp_kernels: int = 2
    outputs: int = 0

    @property
    def block(self) -> int:
        """Numbers of a block."""
        return 4 * self.width**2 + self.mlp_kernels * self.width * self.mlp_width + self.vectors

    @property
    def numbers(self) -> int:
        """Numbers of the model."""
        return self.depth * self.block + self.outside

    @property
    def tokens(self) -> int:
        """Tokens per chip and step."""
        return self.batch * self.sequence


def vit(
    width: int, depth: int, heads: int, mlp_width: int, patch_size: int, *, image_size: int, classes: int, batch: int
) -> Model:
    """A ViT as in `surm_jax.models`, with a class token."""
    sequence = 1 + (image_size // patch_size) ** 2
    outside = 3 * patch_size**2 * width + (sequence + 4) * width + (width + 1) * classes
    return Model(width, depth, mlp_width, heads, 9 * width + mlp_width, outside, sequence, batch)


MODELS = {
    "ViT-B/16": vit(768, 12, 12, 3072, 16, image_size=224, classes=1000, batch=64),
    # Table 2 of https://arxiv.org/abs/2106.04560.
    "ViT-g/14": vit(1408, 40, 16, 6144, 14, image_size=224, classes=1000, batch=32),
    # The geometry of Llama 2 7B (https://arxiv.org/abs/2307.09288), tokens in and out.
    "decoder, 7 B": Model(
        width=4096,
        depth=32,
        mlp_width=11008,
        mlp_kernels=3,
        heads=32,
        vectors=2 * 4096,
        outside=2 * 32000 * 4096 + 4096,
        outputs=32000,
        sequence=2048,
        batch=2,
    ),
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator and its network, per chip.

    Attributes:
      flops: bfloat16 operations per second.
      memory: bytes.
      memory_rate: bytes per second between it and the chip.
      near: how many chips the fast network joins.
      near_rate: bytes per second that a chip sends in a ring over the fast network.
      far_rate: the same over the slow network.
      hop: seconds that a message needs at least.
    """

    flops: float
    memory: float
    memory_rate: float
    near: int
    near_rate: float
    far_rate: float
    hop: float


CHIPS = {
    # https://cloud.google.com/tpu/docs/v5e: 400 GB/s in and out over four links, two of which make a ring; 6.4 Tbit/s
    # for the 256 chips of a pod.
    "TPU v5e": Chip(197e12, 16e9, 819e9, 256, 100e9, 3.1e9, 1e-6),
    # https://www.nvidia.com/en-us/data-center/h100, SXM: 900 GB/s in and out within eight; 400 Gbit/s to others.
    "H100": Chip(989e12, 80e9, 3350e9, 8, 450e9, 50e9, 5e-6),
}


def trained_numbers(model: Model, method: str) -> int:
    """Numbers that are trained: on Q, K and V two vectors for a circulant pair, 32 for LoRA of rank 16; or all."""
    vectors = {"circulant": 2, "lora": 32}
    return model.numbers if method == "full" else 3 * model.depth * vectors[method] * model.width


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on so many chips.

    Attributes:
      fsdp: chips that share the frozen base.
    """

    model: Model
    method: str
    chip: Chip
    chips: int
    fsdp: int

    @property
    def base_bytes(self) -> float:
        """Of the frozen base, bfloat16, on one chip; of split blocks two are there as a whole, one in use, one on its
        way."""
        if self.method == "full":
            return 0.0
        whole = 2 * 2 * self.model.block if self.fsdp > 1 else 0
        return 2 * self.model.numbers / self.fsdp + whole

    @property
    def trained_bytes(self) -> float:
        """Of what is trained: float32 value, gradient and two moments of AdamW; for `full` a bfloat16 copy beside."""
        return (18 if self.method == "full" else 16) * trained_numbers(self.model, self.method)

    @property
    def activation_bytes(self) -> float:
        """Of activations, `config.model.remat=block`: what each block reads, one block from the inside, and logits."""
        model = self.model
        inside = 2 * (8 * model.width + 2 * model.mlp_kernels * model.mlp_width / 2) + 6 * model.heads * model.sequence
        return model.tokens * (2 * model.depth * model.width + inside + 8 * model.outputs)

    @property
    def bytes(self) -> float:
        """Of all on one chip."""
        return self.base_bytes + self.trained_bytes + self.activation_bytes

    @property
    def gathered_bytes(self) -> float:
        """That a chip receives of the base in a step: once forward, once backward."""
        return 0.0 if self.method == "full" else 2 * 2 * self.model.numbers * (self.fsdp - 1) / self.fsdp

    @property
    def reduced_bytes(self) -> float:
        """That a chip sends of the gradient: a ring sends nearly everything twice."""
        return 2 * 4 * trained_numbers(self.model, self.method) * (self.chips - 1) / self.chips

    @property
    def compute_seconds(self) -> float:
        """Of the base's products: forward, again for the backward pass, gradient of inputs; for `full` of kernels."""
        model = self.model
        forward = 2 * (model.numbers - model.outside) + 4 * model.depth * model.sequence * model.width
        forward += 2 * model.outputs * model.width
        passes = 4 if self.method == "full" else 3
        return passes * forward * model.tokens / (UTILISATION * self.chip.flops)

    @property
    def update_seconds(self) -> float:
        """Of the updates: by the memory that transforms read and write, or by dense products, whichever is less."""
        model = self.model
        rows = 3 * model.depth * model.tokens
        if self.method == "full":
            return 0.0
        if self.method == "lora":
            return rows * 10 * model.width / self.chip.memory_rate
        dense = rows * 8 * model.width**2 / (UTILISATION * self.chip.flops)
        return min(rows * 40 * model.width / self.chip.memory_rate, dense)

    @property
    def gather_seconds(self) -> float:
        """Of gathering the base, block by block."""
        if self.fsdp == 1 or self.method == "full":
            return 0.0
        hops = 2 * self.model.depth * (self.fsdp - 1) * self.chip.hop
        return self.gathered_bytes / self.chip.near_rate + hops

    @property
    def reduce_seconds(self) -> float:
        """Of reducing the gradient: within the fast network, and then, each chip its part, over the slow one."""
        if self.chips == 1:
            return 0.0
        near, groups = min(self.chips, self.chip.near), math.ceil(self.chips / self.chip.near)
        whole = 2 * 4 * trained_numbers(self.model, self.method)
        seconds = whole * (near - 1) / near / self.chip.near_rate
        seconds += whole / near * (groups - 1) / groups / self.chip.far_rate
        # A torus and trees pass a message on in about the square root, or the logarithm, of the number of chips.
        return seconds + 2 * (math.sqrt(near) + math.log2(groups)) * self.chip.hop

    @property
    def seconds(self) -> float:
        """Of a step: gathering goes on beside the products, reducing comes after."""
        return max(self.compute_seconds + self.update_seconds, self.gather_seconds) + self.reduce_seconds

    @property
    def fits(self) -> bool:
        """Whether a tenth of the chip's memory is left."""
        return self.bytes <= 0.9 * self.chip.memory


def plan(model: Model, method: str, chip: Chip, chips: int) -> Plan:
    """Returns the plan that splits the base over as few chips as hold it, within the fast network."""
    for exponent in range(int(math.log2(min(chips, chip.near))) + 1):
        made = Plan(model, method, chip, chips, 2**exponent)
        if made.fits or method == "full":
            break
    return made


def plan_rows(chip: Chip) -> list[dict[str, Any]]:
    """The table of a chip."""
    rows = []
    for name, model in MODELS.items():
        for method in ("circulant", "lora", "full"):
            for chips in COUNTS:
                made = plan(model, method, chip, chips)
                rows.append(
                    {
                        "model": name,
                        "method": method,
                        "chips": chips,
                        "fsdp": made.fsdp,
                        "base GB": made.base_bytes / 1e9,
                        "trained GB": made.trained_bytes / 1e9,
                        "activations GB": made.activation_bytes / 1e9,
                        "gathered GB": made.gathered_bytes / 1e9,
                        "reduced MB": made.reduced_bytes / 1e6,
                        "step ms": 1e3 * made.seconds if made.fits else None,
                        "examples/s": made.chips * model.batch / made.seconds if made.fits else None,
                    }
                )
    return rows


# A ViT whose collectives can be counted in the compiled program.
SMALL = vit(256, 4, 4, 1024, 8, image_size=32, classes=10, batch=2)
MESHES = ((8, 1), (2, 4), (1, 8))


def compiled_step(method: str, data: int, fsdp: int) -> tuple[Any, int, int, list[int]]:
    """Compiles the training step of `SMALL`.

    Returns:
      The program, the numbers that are trained, the numbers of the base, and those of its arrays that are split.
    """
    config = ViTConfig(
        image_size=32, patch_size=8, width=256, depth=4, heads=4, mlp_width=1024, num_classes=10, dropout=0.0
    )
    settings = make_method(method, {"rank": 16} if method == "lora" else {})
    train = settings.patterns if isinstance(settings, Selection) else ()
    rules = [] if train else [Rule(TARGETS["qkv"], settings)]
    mesh = make_mesh(data, {}, fsdp)
    with jax.set_mesh(mesh):
        model = ViT(config, rngs=nnx.Rngs(0))
        parts, trained, frozen = partition(*adapt(model, rules, train=train, execution="fft", rngs=nnx.Rngs(1)))
        optimizer = optax.adamw(1e-3)
        state, frozen = init_state(trained, optimizer, mesh), put_base(frozen, mesh)
        batch = {
            "image": jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.float32, sharding=batch_sharding(mesh)),
            "label": jax.ShapeDtypeStruct((16,), jnp.int32, sharding=batch_sharding(mesh)),
        }
        step = make_train_step(parts, ImageTask.forward, CLASSES, optimizer, mesh)
        program = step.lower(state, frozen, batch, jax.random.key(0), {}).compile()
    leaves = jax.tree.leaves(frozen)
    split = [leaf.size for leaf in leaves if not leaf.sharding.is_fully_replicated]
    return program, sum(array.size for array in trained.values()), sum(leaf.size for leaf in leaves), split


def check_rows(methods: Iterable[str], meshes: Iterable[tuple[int, int]]) -> list[dict[str, Any]]:
    """Formulas beside compiled programs, float32.

    Arguments are base, trained numbers and two moments, and the batch; collectives as they are written in the program.
    """
    rows = []
    for method in methods:
        for data, fsdp in meshes:
            program, trained, base, split = compiled_step(method, data, fsdp)
            found = collectives(program.as_text())
            replicated = base - sum(split)
            batch = 2 * (32 * 32 * 3 + 1)
            rows.append(
                {
                    "method": method,
                    "data": data,
                    "fsdp": fsdp,
                    "trained": trained,
                    "arguments, formula": 4 * (replicated + sum(split) // fsdp + 3 * trained + batch + 2),
                    "arguments, compiled": program.memory_analysis().argument_size_in_bytes,
                    "gathered, formula": 2 * 4 * sum(split),
                    "gathered, compiled": sum(one.bytes for one in found if one.name == "all-gather"),
                    "reduced, formula": 4 * trained,
                    "reduced, compiled": sum(one.bytes for one in found if one.name == "all-reduce"),
                }
            )
    return rows


def page() -> str:
    """The text of docs/scale.md."""
    count = dict.fromkeys(("chips", "fsdp"), ",")
    sizes = dict.fromkeys(("base GB", "trained GB", "activations GB", "gathered GB"), ",.2f")
    columns = {"model": "", "method": ""} | count | sizes
    columns |= {"reduced MB": ",.1f", "step ms": ",.0f", "examples/s": ",.0f"}
    tables = {name: markdown(plan_rows(chip), columns) for name, chip in CHIPS.items()}
    checks = check_rows(("circulant", "lora", "full"), MESHES)
    largest = [plan(model, "circulant", chip, COUNTS[-1]) for chip in CHIPS.values() for model in MODELS.values()]
    return TEXT.format(
        reduction=max(made.reduce_seconds / made.seconds for made in largest),
        utilisation=f"{UTILISATION:.0%}",
        tpu=tables["TPU v5e"],
        gpu=tables["H100"],
        check=markdown(checks, {key: "" if key == "method" else "," for key in checks[0]}),
    )


def main() -> None:
    """Writes the page."""
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_platforms", "cpu")
    PAGE.write_text(page())
    print(f"wrote {PAGE}")


TEXT = """# Scale

The same command runs on one core and on a pod: what changes is the mesh (`config.mesh.data`, `config.mesh.fsdp`) and
how many processes are started. This page says what a run takes there, by arithmetic, and what of it was checked.
Written by `python -m benchmarks.scale`.

## Commands

With `--workdir` on a file system that all hosts share; `config.data.batch_size` is that of all devices together. One
process on each host of a TPU pod (on GKE the same command in every pod of the job):

```sh
gcloud compute tpus tpu-vm ssh NAME --worker=all \\
    --command="cd surm_jax && python launch.py --config=configs/vit_cifar.py --workdir=/shared/run"
```

One process for each GPU under Slurm. Every task must see all GPUs of its node (`--gpus-per-node`, not
`--gpus-per-task`), of which JAX gives it the one with its number:

```sh
srun --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 \\
    python launch.py --config=configs/vit_cifar.py --workdir=/shared/run
```

By hand, on host I of N:

```sh
python launch.py --config=configs/vit_cifar.py --workdir=/shared/run \\
    --coordinator=HOST0:8476 --process_id=I --num_processes=N
```

Only the last was run, with two and four processes of one machine (`tests/training/test_processes.py`): same losses and
evaluation counts as one process, and the others stop with a message when one is killed. For a base that does not fit
on one device, `--config.mesh.fsdp=8 --config.model.scan_layers=True --config.model.remat=block`.

## What is where

Both axes of the mesh split the batch. What is trained, its gradient and its optimiser are whole on every device; the
frozen base is whole, or split over `fsdp` and put together block by block where it is used. Between devices go: the
gradient of what is trained, once a step; with `fsdp`, the base, once in the forward and once in the backward pass; and
nothing of the size of activations (asserted on compiled programs, `tests/training`).

| | bytes on a device |
|---|---|
| frozen base, bfloat16 | `2 N / fsdp`, and with `fsdp > 1` two whole blocks, `2 * 2 N_block` |
| trained, float32 | `16 P`: value, gradient, two moments of AdamW |
| activations, bfloat16, `config.model.remat=block` | `T (2 L d + 16 d + 2 m k + 6 h s + 8 v)` |
| gathered in a step | `2 * 2 N (fsdp - 1) / fsdp` |
| reduced in a step | `2 * 4 P (c - 1) / c`: a ring sends nearly everything twice |

N: numbers of the base; P: numbers that are trained; c: chips; T: tokens of a chip in a step; L: blocks; d: width; m:
width inside the MLP; k: its kernels; h: heads; s: tokens of an example; v: outputs for every token (0: a classifier).
`16 d + 2 m k` is what one block holds inside, `6 h s` its attention in float32 and bfloat16. `full` has no frozen base:
18 P, and gathers nothing: this library splits what is frozen, and a model whose optimiser does not fit on one chip is
not its case.

| | seconds of a step |
|---|---|
| products | `p T (2 N_blocks + 4 L s d + 2 v d) / F` |
| circulant | `3 L T * 40 d / B` with FFTs, `3 L T * 8 d^2 / F` with dense products: the smaller |
| LoRA | `3 L T * 10 d / B` |
| gathering | bytes over the fast network, and a hop for each message; beside the products |
| reducing | within the fast network, then each chip its part over the slow one; after the products |

F: {utilisation} of the peak, operations a second; B: bytes a second of the memory; p = 3: forward, again for the
backward pass, gradient of inputs; p = 4 where kernels have a gradient. The {utilisation} are an assumption, as are 40
and 10 bytes a token and feature: they are counted from what the programs read and write, and no accelerator was at hand
to measure.

## TPU v5e

197 TFLOP/s, 16 GB at 819 GB/s, 256 chips in a pod, 100 GB/s in a ring; between pods 3.1 GB/s for each chip
(https://cloud.google.com/tpu/docs/v5e). Q, K and V are adapted: a circulant pair (P = 6 L d, as LoRA of rank 1), LoRA
of rank 16, or everything is trained. 64, 32 and 2 examples a chip. `fsdp` is the smallest that leaves a tenth of the
memory free. No time: it does not fit.

{tpu}

## H100

989 TFLOP/s, 80 GB at 3,350 GB/s, 8 in a node at 450 GB/s each way, between nodes 50 GB/s for each
(https://www.nvidia.com/en-us/data-center/h100, SXM).

{gpu}

What it says: the network is no concern for adapters. Of a circulant's step on 2,048 chips at most {reduction:.1%} is
reduction, over whichever network, while full fine-tuning sends gigabytes where it fits at all. What a circulant
costs over LoRA it costs on the chip: its transforms read and write memory, which shows where the width is small.

## Checked

A ViT of width 256, four blocks, 16 images of 32 pixels, float32, compiled for eight simulated devices: bytes on one
device. Arguments: base, trained numbers, two moments, batch and two counters. Collectives: results as they stand in
the program (a ring's factors are not in it). Less is gathered than the formula says, because the backward pass ends
before the kernels that read the first input; and of a circulant pair half is reduced, because both its vectors get
their gradient from one spectrum. `full` has no base to split.

{check}
"""

if __name__ == "__main__":
    main()
