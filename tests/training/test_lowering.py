"""Check that the training steps of every method can be translated for GPUs and TPUs, without calls back to the host.

JAX translates a program for a platform without having a device of it. The result is not compiled.
"""

import re

import jax
import optax
import pytest

from surm_jax.devices import mesh as meshes
from surm_jax.devices.mesh import make_mesh, put_base, put_batch
from surm_jax.peft import METHODS
from surm_jax.tasks.objective import CLASSES
from surm_jax.training.partition import partition
from surm_jax.training.step import init_state, make_eval_step, make_train_step
from tests.speeds import fast
from tests.training import small

PLATFORMS = ("cuda", "tpu")
# Models, methods and executions. Every method occurs once, and the methods with FFTs also with the other executions.
CASES = [
    *(("vit", method, "auto") for method in METHODS),
    ("bert", "circulant", "auto"),
    *(("vit", method, way) for method in ("circulant", "toeplitz", "low_displacement") for way in ("fft", "dense")),
]


@pytest.mark.parametrize(
    ("kind", "method", "execution"), fast(CASES, CASES[0], ("vit", "circulant", "fft"), unpack=True)
)
def test_both_steps_with_split_and_scanned_blocks_are_translated(kind, method, execution, monkeypatch):
    monkeypatch.setattr(meshes, "SMALLEST_SPLIT", 200)
    built, sgd, mesh = (
        small.build(kind, method, {"peft.execution": execution}),
        optax.sgd(0.1),
        make_mesh(4, {}, fsdp=2),
    )
    parts, trained, frozen = partition(built.model, built.adapter, scan_layers=True)
    with jax.set_mesh(mesh):
        state, frozen, batch = init_state(trained, sgd, mesh), put_base(frozen, mesh), put_batch(built.batch, mesh)
        train_step = make_train_step(parts, built.forward, CLASSES, sgd, mesh)
        eval_step = make_eval_step(parts, built.forward, CLASSES, mesh)
        programs = (
            train_step.trace(state, frozen, batch, jax.random.key(0), {}),
            eval_step.trace(state.trained, frozen, batch | {"mask": batch["label"] >= 0}),
        )
        for program in programs:
            for platform in PLATFORMS:
                text = program.lower(lowering_platforms=(platform,)).as_text()
                calls = set(re.findall(r"custom_call @(\w+)", text))
                assert "stablehlo" in text and not calls


def test_a_call_back_to_the_host_cannot_be_translated():
    program = jax.jit(lambda x: jax.pure_callback(lambda x: x, x, x)).trace(1.0)
    with pytest.raises(ValueError, match="different from the lowering platform cuda"):
        program.lower(lowering_platforms=("cuda",))
