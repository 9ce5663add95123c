"""Measure how long a training step takes to compile for models of different depths, looped and scanned.

    python -m benchmarks.depth [--out=FILE.json] [--depths=12,24,48] [--width=64] [--method=circulant] [--remat=none]

A looped model runs its blocks in a Python loop, so every block is a part of the program. A scanned model runs them in
`jax.lax.scan`, so the program contains one block. The model is a narrow ViT with random weights and a trained head. The
method has its default settings and adapts its default modules, and the optimiser is AdamW.

`trace_s` is the time for tracing and lowering in seconds, and `compile_s` that for compiling. `instructions` is the
number of instructions of the compiled program, and `temp_bytes` its temporary memory.
"""

import time

import jax
import jax.numpy as jnp
import optax
from absl import flags
from flax import nnx

from benchmarks.timing import benchmark, device, numbers, setting, table, write
from surm_jax.devices.mesh import make_mesh
from surm_jax.models import REMAT, TARGETS, ViT, ViTConfig
from surm_jax.peft import METHODS, Rule, Selection, adapt, make_method
from surm_jax.pretrained import load
from surm_jax.tasks import ImageClassification
from surm_jax.tasks.objective import CLASSES
from surm_jax.training.partition import partition
from surm_jax.training.step import init_state, make_train_step

DEPTHS = flags.DEFINE_list("depths", ["12", "24", "48"], "Numbers of blocks.")
WIDTH = flags.DEFINE_integer("width", 64, "Features; four heads divide it.", lower_bound=4)
METHOD = flags.DEFINE_enum("method", "circulant", sorted(METHODS), "The method.")
REMAT_NAME = flags.DEFINE_enum("remat", "none", list(REMAT), "Which activations are recomputed in the backward pass.")
BATCH = 8
COLUMNS = {"depth": "", "layers": "", "trace_s": ".1f", "compile_s": ".1f", "instructions": ",", "temp_bytes": ","}


def measure(depth: int, scan: bool, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Compile one training step, and return the times and sizes that belong in its row.

    Args:
        depth: The number of blocks.
        scan: Whether the blocks are scanned instead of looped.
        mesh: The devices.
    """
    config = ViTConfig.from_variant(
        "digits", num_classes=10, depth=depth, width=WIDTH.value, mlp_width=4 * WIDTH.value, remat=REMAT_NAME.value
    )
    method = make_method(METHOD.value, {})
    rules = [] if isinstance(method, Selection) else [Rule(TARGETS[method.target], method)]
    train = ["head/.*", *(method.patterns if isinstance(method, Selection) else [])]
    model = load(None, lambda: ViT(config, rngs=nnx.Rngs(0)))
    parts, trained, frozen = partition(*adapt(model, rules, train=train, rngs=nnx.Rngs(1)), scan_layers=scan)
    optimizer = optax.adamw(1e-4)
    state = init_state(trained, optimizer, mesh)
    batch = {"image": jnp.zeros((BATCH, 8, 8, 1)), "label": jnp.zeros(BATCH, jnp.int32)}
    began = time.perf_counter()
    step = make_train_step(parts, ImageClassification.forward, CLASSES, optimizer, mesh)
    lowered = step.lower(state, frozen, batch, jax.random.key(0), {})
    traced = time.perf_counter()
    compiled = lowered.compile()
    return {
        "trace_s": traced - began,
        "compile_s": time.perf_counter() - traced,
        "instructions": compiled.as_text().count(" = "),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def main() -> None:
    """Compile all steps, print a table of the results, and write them as rows to the file of `--out`."""
    depths, mesh, rows = numbers(DEPTHS), make_mesh(1, {}), []
    with jax.set_mesh(mesh):
        measure(min(depths), False, mesh)  # discarded: the first compilation also does what later ones need not repeat
        for depth in depths:
            for layers in ("looped", "scanned"):
                print(f"{depth} blocks, {layers}", flush=True)
                row = {"depth": depth, "layers": layers, "method": METHOD.value, "width": WIDTH.value, "batch": BATCH}
                rows.append(row | {"remat": REMAT_NAME.value} | setting() | measure(depth, layers == "scanned", mesh))
    print(f"width {WIDTH.value}, {METHOD.value}, batch {BATCH}, on {device()}, jax {jax.__version__}")
    print(table(rows, COLUMNS))
    write(rows)


if __name__ == "__main__":
    benchmark(main)
