"""Compare the formulas of `docs/scale.md` with real models, adapters and compiled programs."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from benchmarks import scale
from benchmarks.hlo import collectives
from surm_jax.devices.mesh import batch_sharding, make_mesh, put_base
from surm_jax.models import TARGETS, ViT, ViTConfig
from surm_jax.peft import Rule, Selection, adapt, make_method
from surm_jax.tasks import ImageClassification
from surm_jax.tasks.objective import CLASSES
from surm_jax.training.partition import partition
from surm_jax.training.step import init_state, make_train_step


def numbers(model):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_numbers_are_those_of_the_model():
    config = ViTConfig.from_variant("B/16", num_classes=1000)
    abstract = nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))
    assert scale.MODELS["ViT-B/16"][0].numbers == numbers(abstract) == 86_567_656
    # This is Llama 2 7B (https://arxiv.org/abs/2307.09288), whose checkpoint holds 6,738,415,616 parameters.
    assert scale.MODELS["decoder, 7 B"][0].numbers == 6_738_415_616


@pytest.mark.parametrize(
    ("method", "settings"), [("circulant", {}), pytest.param("lora", {"rank": 16}, marks=pytest.mark.exhaustive)]
)
def test_trained_numbers_are_those_of_the_adapter(method, settings):
    config = ViTConfig.from_variant("B/16", num_classes=1000)

    def adapted():
        model = ViT(config, rngs=nnx.Rngs(0))
        return adapt(model, [Rule(TARGETS["qkv"], make_method(method, settings))], rngs=nnx.Rngs(0))[0]

    before = numbers(nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0))))
    assert scale.trained_numbers(scale.MODELS["ViT-B/16"][0], method) == numbers(nnx.eval_shape(adapted)) - before


def compiled_step(method, data, fsdp):
    """Compile the training step of a small ViT for a mesh of devices.

    Args:
        method: The fine-tuning method.
        data: The number of devices in the mesh axis that only the batch is split over.
        fsdp: The number of devices in the mesh axis that the frozen base model is split over too.

    Returns:
        The compiled program, and three numbers of parameters: those that are trained, the frozen ones that every device
        holds completely, and the frozen ones that are split over devices.
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
    split = sum(leaf.size for leaf in leaves if not leaf.sharding.is_fully_replicated)
    return program, sum(array.size for array in trained.values()), sum(leaf.size for leaf in leaves) - split, split


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("method", "data", "fsdp"),
    [("lora", 2, 4), ("lora", 1, 8), ("lora", 8, 1), ("circulant", 2, 4), ("circulant", 8, 1), ("full", 8, 1)],
)
def test_compiled_programs_hold_and_send_what_the_formulas_say(method, data, fsdp):
    # Allow implicit dtype promotion, because optax uses its integer step counter in floating-point formulas.
    with jax.numpy_dtype_promotion("standard"):
        program, trained, replicated, split = compiled_step(method, data, fsdp)
    # The arguments on one device, all of four bytes: the base model, the values and two moments of the trained
    # parameters, two images and their labels, and two counters.
    batch = 2 * (32 * 32 * 3 + 1)
    assert program.memory_analysis().argument_size_in_bytes == 4 * (
        replicated + split // fsdp + 3 * trained + batch + 2
    )  # fmt: skip
    found = dict.fromkeys(("all-gather", "all-reduce"), 0)
    for one in collectives(program.as_text()):
        found[one.name] += one.bytes
    # The text of a program shows the sizes of results. A ring of c devices sends (c - 1) / c of this size for a gather
    # and twice as much for a reduction, as in the formulas, so divide by these factors. Besides gradients, the loss and
    # the accuracy are reduced, which take up to 64 bytes. For a circulant pair, one half of a spectrum is reduced, from
    # which the gradients of both vectors are computed.
    reduced = scale.reduced_bytes(trained, 8) * 8 / 7 / 2
    assert 0 <= found["all-reduce"] - (reduced / 2 if method == "circulant" else reduced) <= 64
    if fsdp == 1:
        assert found["all-gather"] == 0 == scale.gathered_bytes(split, fsdp)
    else:
        # The backward pass does not need the kernels of the patch embedding and of the first block's Q, K and V, so
        # they are gathered only once.
        left_out = 4 * (3 * 8**2 * 256 + 3 * 256**2)
        whole = scale.gathered_bytes(split, fsdp, size=4) * fsdp / (fsdp - 1)
        assert found["all-gather"] == pytest.approx(whole - left_out, abs=1)


def test_bytes_of_a_known_model():
    model, _ = scale.MODELS["ViT-B/16"]
    assert scale.base_bytes(model, 1) == 2 * 86_567_656
    assert scale.base_bytes(model, 4) == 2 * 86_567_656 / 4 + 2 * 2 * 7_087_872
    assert scale.trained_bytes(55_296) == 16 * 55_296
    # For one example of 197 tokens: the inputs of 12 blocks, the activations inside one block, and its attention.
    assert scale.activation_bytes(model, 1) == 197 * (2 * 12 * 768 + 16 * 768 + 4 * 3072 + 6 * 12 * 197)


def test_reading_collectives():
    hlo = """
  %a = (f32[4,2]{1,0}, u8[3]{0}) all-reduce-start(%x, %y)
  %b = bf16[8]{0} all-gather(%z)
  %c = f32[] add(%p, %q)
"""
    assert collectives(hlo) == [("all-reduce", (8, 3), 35), ("all-gather", (8,), 16)]
