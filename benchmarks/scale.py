"""Writes docs/scale.md: what a run takes of memory, network and time on 1 to 2,048 chips, by formulas, and their check.

    python -m benchmarks.scale

The formulas are in `benchmarks/plan.py` and in the page. What they say of arguments and collectives is compared with
programs that are compiled for eight simulated devices. Times are expectations: no such machine was measured.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.hlo import collectives
from benchmarks.plan import CHIPS, MODELS, UTILISATION, Chip, plan, vit
from benchmarks.report import markdown
from surm_jax.devices.mesh import batch_sharding, make_mesh, put_base
from surm_jax.models import TARGETS, ViT, ViTConfig
from surm_jax.peft import Rule, Selection, adapt, make_method
from surm_jax.tasks import ImageClassification
from surm_jax.tasks.objective import CLASSES
from surm_jax.training.partition import partition
from surm_jax.training.step import init_state, make_train_step

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scale.md"
COUNTS = (1, 8, 256, 2048)


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
        step = make_train_step(parts, ImageClassification.forward, CLASSES, optimizer, mesh)
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the page."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args(arguments)
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_platforms", "cpu")
    PAGE.write_text(page())
    print(f"wrote {PAGE}")


TEXT = """# Scale

The same command runs on one core and on a pod: what changes is the mesh (`config.mesh.data`, `config.mesh.fsdp`) and
how many processes are started. This page says what a run takes there, by arithmetic, and what of it was checked.
Written by `python -m benchmarks.scale`.

## Commands

All hosts need the folder of the run, the prepared data and the weights, on a file system that they share (`/shared`
below). Without `--config.data.dir` each looks for data in its own `~/tensorflow_datasets`, and nothing is prepared
there. `SURM_JAX_CACHE` is where weights are downloaded to, by one process while the others wait, and where compiled
programs are kept; without it each host has its own `~/.cache/surm_jax`.

`config.data.batch_size` and `config.data.eval_batch_size` are those of all devices together, and must be multiples of
their number; with `config.optim.accumulate` the same holds for the batch divided by it. The job's 64 do not divide over
256 chips, so the commands say 256; its learning rate and steps are those for 64.

One process on each host of a TPU pod (on GKE the same command in every pod of the job):

```sh
gcloud compute tpus tpu-vm ssh NAME --worker=all \\
    --command="cd surm_jax && SURM_JAX_CACHE=/shared/cache python launch.py --config=configs/vit_cifar.py \\
    --workdir=/shared/run --config.data.dir=/shared/tfds \\
    --config.data.batch_size=256 --config.data.eval_batch_size=256"
```

One process for each GPU under Slurm. Every task must see all GPUs of its node (`--gpus-per-node`, not
`--gpus-per-task`), of which JAX gives it the one with its number:

```sh
SURM_JAX_CACHE=/shared/cache srun --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 \\
    python launch.py --config=configs/vit_cifar.py --workdir=/shared/run --config.data.dir=/shared/tfds \\
    --config.data.batch_size=256 --config.data.eval_batch_size=256
```

By hand, on host I of N:

```sh
SURM_JAX_CACHE=/shared/cache python launch.py --config=configs/vit_cifar.py --workdir=/shared/run \\
    --config.data.dir=/shared/tfds --config.data.batch_size=256 --config.data.eval_batch_size=256 \\
    --coordinator=HOST0:8476 --process_id=I --num_processes=N
```

Only the last way was run, with two and four processes of one machine (`tests/devices/test_processes.py`): same losses
and evaluation counts as one process, and the others stop with a message when one is killed. For a base that does not
fit on one device, `--config.mesh.fsdp=8 --config.model.scan_layers=True --config.model.remat=block`.

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
