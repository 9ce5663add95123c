import dataclasses
import gc
import json
import os
import shutil
import signal

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from surm_jax.devices import mesh as meshes
from surm_jax.errors import UserError
from surm_jax.peft import adapter_dropout
from surm_jax.record.progress import Interruption
from surm_jax.training import loop
from surm_jax.training import setup as job
from surm_jax.training import step as step_programs
from surm_jax.training.blocks import Stack
from surm_jax.training.loop import train
from surm_jax.training.run import InterruptedRunError, set_up
from surm_jax.training.setup import adapt_model
from tests.training import tiny


def start(config, seed, workdir):
    """Start or resume the run of one seed in a folder, as `train_run` does."""
    with Interruption() as interruption:
        return train(config, seed, workdir, interruption)


@pytest.fixture
def signal_at(monkeypatch):
    """A function `(number, *steps)` that sends the signal `number` to this process in the given steps.

    Steps are counted from 1 at the next start of a run. The signal comes when the batch of the step is moved to the
    devices.
    """

    def arrange(number, *steps):
        put, step = loop.put_batch, 0

        def put_batch(*arguments):
            nonlocal step
            step += 1
            if step in steps:
                os.kill(os.getpid(), number)
            return put(*arguments)

        monkeypatch.setattr(loop, "put_batch", put_batch)

    return arrange


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_a_run_leaves_behind(tiny_files, tmp_path, monkeypatch, capsys):
    config = tiny.make_config(
        tiny_files, "lora", **{"optim.steps": 5, "log.metrics_every": 2, "log.evaluate_every": 2, "data.holdout": 10}
    )
    result = start(config, 0, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "metrics.jsonl", "tensorboard", "checkpoints", "adapter", "curves.png", "result.json",
        "inputs.json",
    }  # fmt: skip
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["steps"] == 5 and result["examples"] == {"test": 21}
    assert result["parameters"]["trainable"] == 3 * 2 * 10 + 33
    assert result["adapter_bytes"] == sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir())
    lines = metrics_of(tmp_path)
    assert [line["step"] for line in lines if "train_loss" in line] == [2, 4, 5]
    # The test set is evaluated once, at the end, and the held-out examples during training.
    assert [line["step"] for line in lines if "holdout_loss" in line] == [2, 4, 5]
    assert not any("test_loss" in line for line in lines)
    best = max(line["holdout_accuracy"] for line in lines if "holdout_loss" in line)
    kept = tiny.read_checkpoints(tmp_path)
    assert kept.keys() >= {4, 5}
    assert best in [line["holdout_accuracy"] for line in lines if "holdout_loss" in line and line["step"] in kept]
    out = capsys.readouterr().out
    assert "trainable: 93 of" in out

    def fail(*_):
        raise AssertionError("a complete run is not made again")

    monkeypatch.setattr(loop, "prepare", fail)
    assert start(config, 0, tmp_path) == result
    # If the result is deleted, the next start makes it again from the last checkpoint.
    monkeypatch.undo()
    (tmp_path / "result.json").unlink()
    again = start(config, 0, tmp_path)
    assert (again["metrics"], again["steps"]) == (result["metrics"], 5)
    assert metrics_of(tmp_path) == lines


def written_out(config, seed, factors):
    """Compute the training losses of a run again, in a simple loop with `optax.adamw` on one device.

    Args:
        config: The configuration of the run. Its settings of the optimiser must be those that are written into this
            function: two micro-batches, label smoothing 0.1, clipping norm 0.5, learning rates 0.05 (adapter) and 0.02
            (head), and weight decay 0.1 for the head.
        seed: The seed of the run.
        factors: For each update, the factor by which the peak learning rates are multiplied.
    """
    prepared = job.prepare(config, seed)
    model, adapter = prepared.adapt(prepared.base_model())
    graphdef, trained, frozen = nnx.split(model, adapter.trainable, ...)
    trained, frozen = jax.tree.map(lambda array: jax.numpy.asarray(np.asarray(array)), (trained, frozen))

    def loss(trained, images, labels, key):
        model_key, adapter_key = jax.random.split(key)
        with adapter_dropout(adapter_key):
            logits = nnx.merge(graphdef, trained, frozen)(images, rngs=model_key)
        targets = 0.9 * jax.nn.one_hot(labels, 3) + 0.1 / 3
        return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()

    def adamw(peak, decay):
        return optax.adamw(lambda count: jax.numpy.array(factors)[count] * peak, weight_decay=decay)

    group = jax.tree.map_with_path(lambda path, _: "head" if path[0].key == "head" else "adapter", trained)
    groups = {"adapter": adamw(0.05, 0.0), "head": adamw(0.02, 0.1)}
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.partition(groups, group))

    def update(trained, state, gradients):
        updates, state = optimizer.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state

    gradient, update = jax.jit(jax.value_and_grad(loss)), jax.jit(update)
    state, batches, losses = optimizer.init(trained), prepared.task.train_batches(seed), []
    for step in range(len(factors)):
        batch, key = next(batches), jax.random.fold_in(jax.random.key(seed), step)
        halves = [
            gradient(trained, batch["image"][half::2], batch["label"][half::2], jax.random.fold_in(key, half))
            for half in (0, 1)
        ]
        losses.append(np.mean([float(value) for value, _ in halves]))
        with jax.numpy_dtype_promotion("standard"):
            trained, state = update(trained, state, jax.tree.map(lambda a, b: (a + b) / 2, *(g for _, g in halves)))
    return losses


@pytest.mark.exhaustive
def test_a_run_is_a_loop_that_is_written_out(tiny_files, tmp_path):
    values = {
        "optim.steps": 8,
        "optim.warmup_ratio": 0.25,
        "optim.decay": "linear",
        "optim.accumulate": 2,
        "optim.label_smoothing": 0.1,
        "optim.clip_norm": 0.5,
        "optim.learning_rate.lora": 0.05,
        "optim.groups.head.learning_rate": 0.02,
        "optim.groups.head.weight_decay": 0.1,
        # With dropout, the loss depends on the number of micro-batches, because each of them draws its own mask.
        "model.dropout": 0.2,
        "peft.lora.dropout": 0.2,
        "log.metrics_every": 1,
    }
    config = tiny.make_config(tiny_files, "lora", **values)
    start(config, 3, tmp_path)
    lines = [line for line in metrics_of(tmp_path) if "train_loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 9))
    factors = [0, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    for group, peak in (("adapter", 0.05), ("head", 0.02)):
        rates = [line[f"learning_rate_{group}"] for line in lines]
        assert rates == pytest.approx([peak * factor for factor in factors], rel=1e-6)
    assert [line["train_loss"] for line in lines] == pytest.approx(written_out(config, 3, factors), rel=1e-5)
    # The gradient is clipped at some steps and not at others.
    norms = [line["gradient_norm"] for line in lines]
    assert min(norms) < 0.5 < max(norms)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:.*RANDOM weights")
def test_a_run_is_split_and_stacked_as_its_configuration_says(tiny_files, tmp_path, monkeypatch):
    monkeypatch.setattr(meshes, "SMALLEST_SPLIT", 30)
    values = {"model.checkpoint": "none", "model.depth": 2, "model.scan_layers": True, "mesh.fsdp": 2}
    prepared = job.prepare(tiny.make_config(tiny_files, "lora", **values), 0)
    assert prepared.mesh.shape == {"data": 4, "fsdp": 2}
    with jax.set_mesh(prepared.mesh), Interruption() as interruption:
        run, position = set_up(prepared, tmp_path, interruption, 0.0)
    (blocks,) = run.model.partition.merge(position.state.trained, run.model.frozen).blocks
    assert type(blocks) is Stack and blocks.depth == 2
    kernel = run.model.frozen["blocks"][0]["stacked"]["mlp"]["up"]["kernel"][...]
    # The stack of two blocks has a kernel of shape (2, 10, 14). Its last axis is split over two devices.
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 10, 7)


def test_checkpoints_hold_no_base_weights(tiny_files, tmp_path):
    start(tiny.make_config(tiny_files, "linear_probe", **{"optim.steps": 1}), 0, tmp_path)
    (leaves, record), *others = tiny.read_checkpoints(tmp_path).values()
    assert not others
    # The checkpoint holds the kernel (30) and the bias (3) of the head, two moments of each, and counters.
    assert sum(array.size for array in leaves.values() if array.ndim) == 3 * 33
    assert not any("attention" in name for name in leaves)
    assert any("attention" in name for name in record["base"])


def test_an_interrupted_run_ends_like_one_that_was_not(tiny_files, tmp_path, signal_at, monkeypatch):
    config = tiny.make_config(
        tiny_files, **{"optim.steps": 6, "optim.warmup_ratio": 1 / 3, "log.metrics_every": 1, "log.evaluate_every": 2}
    )
    start(config, 0, tmp_path / "whole")
    # Interrupt the run twice: at a step with an evaluation, and at a step without one.
    for number, at, step in ((signal.SIGTERM, 2, 2), (signal.SIGINT, 3, 5)):
        signal_at(number, at)
        with pytest.raises(InterruptedRunError, match=f"{number.name}: saved step {step} of 6") as interrupted:
            start(config, 0, tmp_path / "parts")
        assert interrupted.value.status == 128 + number
        assert not (tmp_path / "parts" / "result.json").exists()
        monkeypatch.undo()
    start(config, 0, tmp_path / "parts")
    tiny.assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:.*RANDOM weights")
def test_a_run_that_goes_on_holds_no_more_than_one_that_was_never_stopped(tiny_files, tmp_path, signal_at, monkeypatch):
    values = {"model.checkpoint": "none", "model.depth": 2, "model.scan_layers": True, "optim.steps": 3}
    config = tiny.make_config(tiny_files, "full", **values)

    def bytes_held(workdir):
        """Start or resume a run, and return the bytes of all JAX arrays that exist before its last step."""
        held, put = [], loop.put_batch

        def put_batch(*arguments):
            gc.collect()
            held.append(sum(array.nbytes for array in jax.live_arrays()))
            return put(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "put_batch", put_batch)
            start(config, 0, workdir)
        return held[-1]

    signal_at(signal.SIGTERM, 2)
    with pytest.raises(InterruptedRunError):
        start(config, 0, tmp_path / "parts")
    monkeypatch.undo()
    assert 0 < bytes_held(tmp_path / "parts") <= bytes_held(tmp_path / "whole")


@pytest.mark.exhaustive
def test_a_signal_during_an_evaluation_ends_it_and_the_next_start_makes_it(tiny_files, tmp_path, monkeypatch):
    config = tiny.make_config(tiny_files, **{"optim.steps": 4, "log.metrics_every": 1, "log.evaluate_every": 2})
    start(config, 0, tmp_path / "whole")
    put, batches = step_programs.put_batch, 0

    def put_batch(*arguments):
        nonlocal batches
        batches += 1
        os.kill(os.getpid(), signal.SIGTERM)
        return put(*arguments)

    # The first start is interrupted in its evaluation. The second start begins with that evaluation, and is interrupted
    # again.
    for _ in range(2):
        monkeypatch.setattr(step_programs, "put_batch", put_batch)
        with pytest.raises(InterruptedRunError, match="SIGTERM: saved step 2 of 4"):
            start(config, 0, tmp_path / "parts")
        monkeypatch.undo()
        assert [line["step"] for line in metrics_of(tmp_path / "parts") if "test_loss" in line] == []
    assert batches == 2
    start(config, 0, tmp_path / "parts")
    tiny.assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.exhaustive
def test_an_evaluation_that_fails_loses_no_step(tiny_files, tmp_path, monkeypatch):
    config = tiny.make_config(tiny_files, **{"optim.steps": 2, "log.metrics_every": 1, "log.checkpoint_every": 0})
    start(config, 0, tmp_path / "whole")

    def put_batch(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(step_programs, "put_batch", put_batch)
    with pytest.raises(RuntimeError, match="out of memory"):
        start(config, 0, tmp_path / "parts")
    monkeypatch.undo()
    # Resume the run with a smaller batch size for evaluations, as a user would after running out of memory.
    smaller = dataclasses.replace(config, data=dataclasses.replace(config.data, eval_batch_size=24))
    assert smaller.data.eval_batch_size != config.data.eval_batch_size
    start(smaller, 0, tmp_path / "parts")
    whole, parts = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "parts"))
    assert parts["metrics"] == pytest.approx(whole["metrics"], rel=1e-5)
    steps = [line["step"] for line in metrics_of(tmp_path / "parts") if "train_loss" in line]
    assert steps == [1, 2]


@pytest.mark.exhaustive
def test_a_signal_in_the_last_step_saves_it(tiny_files, tmp_path, signal_at, monkeypatch):
    config = tiny.make_config(tiny_files, "linear_probe", **{"optim.steps": 2})
    start(config, 0, tmp_path / "whole")
    signal_at(signal.SIGTERM, 2)
    with pytest.raises(InterruptedRunError, match="SIGTERM: saved step 2 of 2"):
        start(config, 0, tmp_path / "parts")
    monkeypatch.undo()
    assert start(config, 0, tmp_path / "parts")["steps"] == 2
    tiny.assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.exhaustive
def test_a_loss_that_is_not_finite_stops_the_run_and_loses_nothing(tiny_files, tmp_path, monkeypatch):
    config = tiny.make_config(
        tiny_files, "full", **{"optim.steps": 9, "log.checkpoint_every": 1, "log.metrics_every": 1}
    )
    put, step = loop.put_batch, 0

    def put_batch(batch, mesh):
        nonlocal step
        step += 1
        if step == 4:
            batch = {**batch, "image": np.full_like(batch["image"], np.nan)}
        return put(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", put_batch)
    last = f"The last good checkpoint is that of step 3, {tmp_path / 'run' / 'checkpoints' / '3'}"
    with pytest.raises(UserError, match=rf"train_loss is nan at step 4: .*\. {last}$"):
        start(config, 0, tmp_path / "run")
    assert tiny.read_checkpoints(tmp_path / "run").keys() == {2, 3}
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3]
    # The earlier checkpoint is intact: without the bad batch, the run resumes from it.
    monkeypatch.undo()
    assert start(config, 0, tmp_path / "run")["steps"] == 9
    steps = [line["step"] for line in metrics_of(tmp_path / "run") if "train_loss" in line]
    assert steps == list(range(1, 10))


def test_a_learning_rate_beyond_reason_stops_with_the_step(tiny_files, tmp_path):
    config = tiny.make_config(tiny_files, "full", **{"optim.learning_rate.full": 1e30, "log.checkpoint_every": 0})
    message = r"is (nan|inf) at step [23]: look at the data, or lower the learning rate\. There is no checkpoint yet$"
    with pytest.raises(UserError, match=message):
        start(config, 0, tmp_path)
    assert not (tmp_path / "adapter").exists() and not (tmp_path / "result.json").exists()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_checkpoints_of_another_base_are_refused(tiny_files, tmp_path, signal_at, monkeypatch):
    config = tiny.make_config(tiny_files, "linear_probe", **{"optim.steps": 3})
    signal_at(signal.SIGTERM, 1)
    with pytest.raises(InterruptedRunError):
        start(config, 0, tmp_path / "run")
    monkeypatch.undo()
    # Change one bit of the weights in the same file.
    weights = tiny_files / "weights.safetensors"
    content = weights.read_bytes()
    try:
        changed = bytearray(content)
        changed[-2] ^= 1
        weights.write_bytes(changed)
        with pytest.raises(UserError, match="the base model is not the one that the checkpoint"):
            start(config, 0, tmp_path / "run")
    finally:
        weights.write_bytes(content)
    assert tiny.read_checkpoints(tmp_path / "run").keys() == {1}


@pytest.mark.exhaustive
def test_a_frozen_factor_that_is_drawn_otherwise_is_refused(tiny_files, tmp_path, signal_at, monkeypatch):
    config = tiny.make_config(tiny_files, "lora_fix", **{"optim.steps": 3})
    signal_at(signal.SIGTERM, 1)
    with pytest.raises(InterruptedRunError):
        start(config, 0, tmp_path)
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        # Draw the constants of the adapter from another seed, because another version of JAX might draw other numbers.
        patch.setattr(job, "adapt_model", lambda model, peft, seed: adapt_model(model, peft, seed + 1))
        with pytest.raises(UserError, match=r"checkpoint .*/1 was .* values in blocks/0/attention/key/delta/default/"):
            start(config, 0, tmp_path)
    assert start(config, 0, tmp_path)["steps"] == 3


def test_a_damaged_checkpoint_deleted_as_advised_lets_the_run_go_on(tiny_files, tmp_path, signal_at, monkeypatch):
    config = tiny.make_config(tiny_files, "linear_probe", **{"optim.steps": 4, "log.evaluate_every": 2})
    signal_at(signal.SIGTERM, 3)
    with pytest.raises(InterruptedRunError):
        start(config, 0, tmp_path)
    monkeypatch.undo()
    chunk = max((tmp_path / "checkpoints" / "3").rglob("d/*"))
    chunk.write_bytes(chunk.read_bytes()[:100])
    with pytest.raises(
        UserError, match=f"{tmp_path}/checkpoints/3 is damaged .*delete that folder to go on from step 2"
    ):
        start(config, 0, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    assert start(config, 0, tmp_path)["steps"] == 4
