import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.hlo import gathered_sizes
from surm_jax.devices.mesh import make_mesh, put_batch, replicated
from surm_jax.models.layers import split_block_keys, split_key
from surm_jax.peft.parts.dropout import dropout_key
from surm_jax.structured.products import execution, fourier
from surm_jax.tasks import ImageClassification
from surm_jax.tasks.objective import CLASSES, NUMBER, cross_entropy, squared_error
from surm_jax.training.optimizer import Rates, make_optimizer
from surm_jax.training.partition import Partition
from surm_jax.training.step import init_state, make_train_step
from tests.speeds import fast
from tests.training import tiny

# Use plain gradient descent. Adam's updates would hide the size of the gradients and amplify their rounding errors.
SGD = optax.sgd(1.0)
KEY = jax.random.key(0)


def make_step(partition, optimizer, mesh, **options):
    return make_train_step(partition, ImageClassification.forward, CLASSES, optimizer, mesh, **options)


class Trace(Partition):
    """A `Partition` that counts the calls of `merge`, which happen only when JAX traces the training step."""

    count = 0

    def merge(self, trained, frozen):
        type(self).count += 1
        return super().merge(trained, frozen)


class Toy:
    """A replacement for `Partition`, whose model ignores the images. Its loss shows the dropout key that it gets.

    `key_logits` computes the logits from the key.
    """

    @staticmethod
    def merge(trained, frozen):
        return lambda images, rngs: jnp.broadcast_to(key_logits(rngs), (len(images), 2)) + 0 * trained["w"]


def key_logits(key):
    return (jax.random.key_data(key).astype(jnp.float32) / 2.0**31)[None]


def run_step(built, mesh, optimizer, **options):
    """Make the first training step of a job.

    Args:
        built: The job.
        mesh: The device mesh.
        optimizer: The optimiser.
        **options: Keyword arguments of `make_train_step`.

    Returns:
        The trained arrays after the step, its metrics, and the text of its compiled program.
    """
    step = make_step(built.partition, optimizer, mesh, **options)
    with jax.set_mesh(mesh):
        state = init_state(built.trained, optimizer, mesh)
        frozen = jax.device_put(built.frozen, replicated(mesh))
        batch = put_batch(tiny.batch_of(built), mesh)
        compiled = step.lower(state, frozen, batch, KEY, {}).compile()
        state, metrics = compiled(state, frozen, batch, KEY, {})
    return tiny.host(state.trained), {name: float(value) for name, value in metrics.items()}, compiled.as_text()


@pytest.mark.parametrize("method", fast(tiny.METHODS, "circulant", "full"))
def test_what_a_step_changes_and_what_not(built_for, method):
    built, mesh = built_for(method), make_mesh(0, {})
    config = dataclasses.replace(built.job.config.optim, steps=100)
    optimizer, rates = make_optimizer(config, built.trained), Rates(config, method, built.trained)
    parts = Trace(built.partition.graphdef, built.partition.slots)
    Trace.count = 0
    step = make_step(parts, optimizer, mesh)
    before, frozen_before = tiny.host(built.trained), tiny.host(built.frozen)
    with jax.set_mesh(mesh):
        state = init_state(built.trained, optimizer, mesh)
        frozen = jax.device_put(built.frozen, replicated(mesh))
        for number in range(1, 5):
            given = state
            # Use another key and other learning rates in every step. `Trace` checks that JAX traces the step only once.
            key = jax.random.key(number)
            state, metrics = step(state, frozen, put_batch(tiny.batch_of(built), mesh), key, rates.before(number))
            assert int(state.step) == number
            # The old state is donated and thus deleted. The frozen arrays are not.
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
            assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
    assert Trace.count == 1
    assert all(math.isfinite(value) for value in metrics.values())
    tiny.assert_equal_bits(tiny.host(frozen), frozen_before)
    # `init_state` has copied the trained arrays, so that those of the caller still exist.
    tiny.assert_equal_bits(tiny.host(built.trained), before)
    after = tiny.host(state.trained)
    assert after.keys() == before.keys()
    assert not [name for name in after if np.array_equal(after[name], before[name])]
    # The optimiser's state holds two moments of every trained parameter. The rest are counters, which have no axes.
    trained = sum(array.size for array in before.values())
    assert sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim) == 2 * trained
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {np.dtype("float32")}


def kernel_gradients(built):
    """Return the shapes of all kernel gradients that a training step computes.

    They are found in the jaxpr of the step: products and convolutions that sum over the examples of the batch, with
    results in the shape of a kernel, up to the order of the axes.
    """
    mesh = make_mesh(1, {})
    step = make_step(built.partition, SGD, mesh)
    kernels = {tuple(sorted(shape)) for shape in [(10, 2, 5), (10, 10), (10, 14), (4, 4, 1, 10)]}
    with jax.set_mesh(mesh):
        batch = tiny.batch_of(built)
        jaxpr = jax.make_jaxpr(step)(init_state(built.trained, SGD, mesh), built.frozen, batch, KEY, {})
    found = []

    def sums_over_the_batch(equation):
        if equation.primitive.name == "conv_general_dilated":
            return True
        # The product of an update's two factors also has the shape of a kernel, but it does not sum over the examples.
        (axes, _), _ = equation.params["dimension_numbers"]
        return math.prod(equation.invars[0].aval.shape[axis] for axis in axes) >= len(batch["label"])

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "conv_general_dilated") and sums_over_the_batch(equation):
                shapes = [tuple(out.aval.shape) for out in equation.outvars]
                found.extend(shape for shape in shapes if tuple(sorted(shape)) in kernels)
            for value in equation.params.values():
                for part in value if isinstance(value, list | tuple) else [value]:
                    inner = getattr(part, "jaxpr", part)
                    if hasattr(inner, "eqns"):
                        walk(inner)

    walk(jaxpr.jaxpr)
    return found


def test_frozen_kernels_get_no_gradient(built_for):
    # With full fine-tuning, seven kernels get a gradient: four of the attention, two of the MLP and one of the patches.
    assert len(kernel_gradients(built_for("full"))) == 7
    for method in ("circulant", "lora", "linear_probe"):
        assert kernel_gradients(built_for(method)) == []


@pytest.mark.parametrize("method", fast(["circulant", "full"], "circulant"))
def test_micro_batches_make_one_batch(built_for, method):
    built, mesh = built_for(method), make_mesh(0, {})
    whole, metrics, _ = run_step(built, mesh, SGD, label_smoothing=0.1)
    parts, part_metrics, program = run_step(built, mesh, SGD, label_smoothing=0.1, accumulate=2)
    assert metrics["train_accuracy"] not in (0, 1)
    assert part_metrics == pytest.approx(metrics, rel=1e-5)
    tiny.assert_close(whole, parts, 1e-6)
    assert gathered_sizes(program) == []


@pytest.mark.parametrize("method", fast(tiny.METHODS, "circulant"))
def test_eight_devices_compute_what_one_computes_and_gather_nothing(built_for, method):
    built = built_for(method)
    one, metrics, _ = run_step(built, make_mesh(1, {}), SGD)
    eight, eight_metrics, program = run_step(built, make_mesh(8, {}), SGD)
    assert eight_metrics == pytest.approx(metrics, rel=1e-5)
    before = tiny.host(built.trained)
    assert max(np.abs(one[name] - before[name]).max() for name in one) > 1e-2
    tiny.assert_close(one, eight, 1e-6)
    assert gathered_sizes(program) == []
    assert "all-reduce" in program


@pytest.mark.exhaustive
def test_transforms_that_are_not_kept_local_would_gather(built_for, monkeypatch):
    # Without `batch_local`, arrays are gathered, which shows that the check in the test above can fail.
    monkeypatch.setattr(fourier, "_convolve_rows", fourier._convolve_rows.__wrapped__)
    monkeypatch.setattr(execution, "batch_local", lambda product: product)
    jax.clear_caches()
    _, _, program = run_step(built_for("circulant"), make_mesh(8, {}), SGD)
    jax.clear_caches()
    assert max(gathered_sizes(program)) >= 16 * 5 * 10


@functools.cache
def toy_step(accumulate):
    return make_step(Toy(), optax.sgd(0.0), make_mesh(1, {}), accumulate=accumulate)


def drawn(count, seed=0, accumulate=1, start=0):
    """Return the training losses of `count` steps of the `Toy` model, which show the dropout keys.

    Args:
        count: The number of steps.
        seed: The seed of the run's key.
        accumulate: The number of micro-batches.
        start: The number of steps that the training state has already counted before the first of these steps.
    """
    mesh = make_mesh(1, {})
    batch = put_batch({"image": np.zeros((8, 2), np.float32), "label": np.zeros(8, np.int32)}, mesh)
    state = init_state({"w": jnp.zeros(())}, optax.sgd(0.0), mesh)._replace(step=jnp.array(start, jnp.int32))
    losses = []
    for _ in range(count):
        state, metrics = toy_step(accumulate)(state, {}, batch, jax.random.key(seed), {})
        losses.append(float(metrics["train_loss"]))
    return losses


@pytest.mark.parametrize("accumulate", [1, 4])
def test_keys_come_from_seed_and_step_alone(accumulate):
    losses = drawn(4, accumulate=accumulate)
    assert len(set(losses)) == 4
    assert drawn(4, accumulate=accumulate) == losses
    assert drawn(2, accumulate=accumulate, start=2) == losses[2:]


def test_another_seed_draws_other_keys():
    assert not set(drawn(4, seed=1)) & set(drawn(4))


def test_every_micro_batch_has_its_own_key():
    key = jax.random.fold_in(jax.random.key(0), 0)
    # The key of each micro-batch is split into two: the first is for the model, and the second for the adapter.
    keys = [jax.random.split(jax.random.fold_in(key, index))[0] for index in range(4)]
    losses = [float(cross_entropy(key_logits(key), jnp.zeros(1, jnp.int32))[0]) for key in keys]
    assert len(set(losses)) == 4
    assert drawn(1, accumulate=4)[0] == pytest.approx(np.mean(losses), rel=1e-6)


def test_the_model_and_its_adapter_never_draw_the_same_dropout():
    drawn = {}

    def forward(model, batch, key):
        embedding, blocks = split_block_keys(key, 3)
        keys = {"embedding": embedding, **{f"block {index}": blocks[index] for index in range(3)}}
        keys |= {f"{name}, {part}": own for name in list(keys) for part, own in enumerate(split_key(keys[name], 3))}
        keys |= {f"adapter {index}": dropout_key() for index in range(9)}
        for name, own in keys.items():
            jax.debug.callback(functools.partial(drawn.__setitem__, name), jax.random.key_data(own))
        return model(batch["image"], key)

    step = make_train_step(Toy, forward, CLASSES, SGD, make_mesh(1, {}))
    batch = {"image": jnp.zeros((2, 1)), "label": jnp.zeros(2, jnp.int32)}
    step(init_state({"w": jnp.zeros(())}, SGD, make_mesh(1, {})), {}, batch, KEY, {})
    jax.effects_barrier()
    assert len(drawn) == 4 + 4 * 3 + 9
    assert len({tuple(np.asarray(own).tolist()) for own in drawn.values()}) == len(drawn)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32(built_for):
    exact, rounded = built_for("circulant"), built_for("circulant", **{"model.dtype": "bfloat16"})
    mesh = make_mesh(8, {})
    arrays, metrics, _ = run_step(exact, mesh, SGD)
    # The gradient of jax.nn.dot_product_attention mixes bfloat16 with the float32 of the softmax, which needs implicit
    # dtype promotion.
    with jax.numpy_dtype_promotion("standard"):
        rounded_arrays, rounded_metrics, program = run_step(rounded, mesh, SGD)
    assert {array.dtype for array in rounded_arrays.values()} == {np.dtype("float32")}
    assert rounded_metrics["train_loss"] != metrics["train_loss"]
    assert rounded_metrics["train_loss"] == pytest.approx(metrics["train_loss"], rel=2e-2)
    start = tiny.host(exact.trained)
    gradients, rounded_gradients = (
        {name: start[name] - after[name] for name in start} for after in (arrays, rounded_arrays)
    )
    # At the start, one of the two factors of each update is zero. So the gradient of the other factor, r2, is zero.
    still = {name for name, gradient in gradients.items() if not gradient.any()}
    assert still == {name for name in start if name.endswith("/r2']")} and len(still) == 3
    tiny.assert_near(gradients, rounded_gradients, 3e-2)
    assert "bf16[" in program
    assert gathered_sizes(program) == []


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_its_definition(smoothing):
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.normal(size=(7, 4)), rng.integers(0, 4, 7)
    log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -(1 - smoothing) * log_softmax[np.arange(7), labels] - smoothing * log_softmax.mean(1)
    losses = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels, jnp.int32), smoothing)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_squared_error_is_its_definition():
    rng = np.random.default_rng(0)
    outputs, labels = rng.normal(size=(7, 1)).astype(np.float32), rng.normal(size=7).astype(np.float32)
    losses = squared_error(jnp.asarray(outputs), jnp.asarray(labels))
    np.testing.assert_allclose(losses, (outputs[:, 0] - labels) ** 2, rtol=1e-6)
    np.testing.assert_array_equal(NUMBER.predict(jnp.asarray(outputs)), outputs[:, 0])


def test_label_smoothing_reaches_the_step(built_for):
    built, mesh = built_for("linear_probe"), make_mesh(1, {})
    batch = tiny.batch_of(built)
    logits = tiny.logits_of(built, batch["image"])
    expected = float(cross_entropy(logits, batch["label"], 0.3).mean())
    _, metrics, _ = run_step(built, mesh, SGD, label_smoothing=0.3)
    assert metrics["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["train_accuracy"] == pytest.approx(float((logits.argmax(-1) == batch["label"]).mean()))


def test_the_gradient_norm_is_that_before_clipping(built_for):
    built, mesh = built_for("linear_probe"), make_mesh(1, {})
    clipped = optax.chain(optax.clip_by_global_norm(1e-3), SGD)
    arrays, metrics, _ = run_step(built, mesh, SGD)
    _, clipped_metrics, _ = run_step(built, mesh, clipped)
    before = tiny.host(built.trained)
    norm = math.sqrt(sum(((arrays[name] - before[name]).astype(np.float64) ** 2).sum() for name in arrays))
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    assert clipped_metrics["gradient_norm"] == metrics["gradient_norm"]
