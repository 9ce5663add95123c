import jax
import numpy as np
import pytest

from surm_jax import data
from surm_jax.devices.mesh import make_mesh, replicated
from surm_jax.training.step import evaluate, make_eval_step
from tests.training import tiny


@pytest.fixture(scope="module")
def built(built_for) -> tiny.Built:
    # The model has dropout, which must have no effect in an evaluation.
    return built_for("lora", **{"model.dropout": 0.5})


@pytest.fixture(scope="module")
def expected(built) -> dict[str, float]:
    source = built.job.task.dataset.test
    images = np.stack([source[index]["image"] for index in range(21)]).astype(np.float32) / 127.5 - 1
    labels = np.array([source[index]["label"] for index in range(21)])
    logits = tiny.logits_of(built, images).astype(np.float64)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(21), labels]
    return {"accuracy": (logits.argmax(1) == labels).mean(), "loss": losses.mean(), "examples": 21}


def measure(built, devices, batch_size, spoil=lambda batch: batch):
    mesh = make_mesh(devices, {})
    batches, task = data.eval_batches(built.job.task.dataset.test, batch_size=batch_size, image_size=8), built.job.task
    with jax.set_mesh(mesh):
        trained, frozen = jax.device_put((built.trained, built.frozen), replicated(mesh))
        step = make_eval_step(built.partition, task.forward, task.objective, mesh)
        return evaluate(step, trained, frozen, map(spoil, batches), task.metrics, mesh)


@pytest.mark.parametrize(("devices", "batch_size"), [(8, 16), (1, 21), (2, 40)])
def test_metrics_of_an_odd_number_of_examples(built, expected, devices, batch_size):
    assert 0 < expected["accuracy"] < 1
    measured = measure(built, devices, batch_size)
    assert measured == pytest.approx(expected, rel=1e-5)
    assert measured["accuracy"] * 21 == pytest.approx(round(measured["accuracy"] * 21), abs=1e-12)
    assert type(measured["examples"]) is int


class Pending(np.ndarray):
    """A fake result of a device, which is 0 until `evaluate` waits for it by `block_until_ready`, and then 1."""

    def block_until_ready(self):
        self.flat[:] = 1


def test_batches_wait_for_the_device():
    asked = []

    def step(trained, frozen, batch):
        asked.append(np.zeros(2, int).view(Pending))
        return {**batch, "prediction": asked[-1], "counts": batch["mask"]}

    def batches():
        for _ in range(6):
            # Before each batch, `evaluate` must have waited for all results except the last.
            assert all(pending.all() for pending in asked[:-1])
            yield {"label": np.ones(2, int), "loss": np.zeros(2), "mask": np.ones(2, bool)}

    assert evaluate(step, {}, {}, batches(), ["accuracy"], make_mesh(1, {}))["examples"] == 12
    assert len(asked) == 6


@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize("poison", [np.nan, 1e30])
def test_padding_never_counts(built, expected, poison, label):
    # The padding gets each label in turn. For one of the three, the model's prediction in the padding is correct.
    spoiled = 0

    def spoil(batch):
        nonlocal spoiled
        padding = ~batch["mask"]
        spoiled += padding.sum()
        batch["image"][padding], batch["label"][padding] = poison, label
        return batch

    assert measure(built, 8, 16, spoil) == pytest.approx(expected, rel=1e-5)
    assert spoiled == 32 - 21
