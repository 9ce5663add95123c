"""Tests of whole runs on GLUE, from a folder of transformers to a result, and of exports to transformers and peft."""

import dataclasses
import json
import logging
import os
import re
import signal
import warnings

import jax
import numpy as np
import pytest
from flax import nnx

from surm_jax import data
from surm_jax.devices.mesh import put_batch, replicated
from surm_jax.errors import UserError
from surm_jax.models import Bert
from surm_jax.peft import load_adapter
from surm_jax.pretrained import from_pretrained, load
from surm_jax.training import loop
from surm_jax.training.modes import evaluate_run, export_run, merge_run, train_run
from surm_jax.training.parsing import saved_config
from surm_jax.training.partition import partition
from surm_jax.training.run import InterruptedRunError
from surm_jax.training.setup import prepare
from surm_jax.training.step import make_eval_step
from tests.training import tiny, tiny_text

# A high learning rate, so that training changes the logits clearly, and dropout. Tests that share these values also
# share compiled programs.
LOUD = {"optim.learning_rate.circulant": 0.1, "model.dropout": 0.1}
PEERS = "compares with a PyTorch library: pip install -r requirements-peers.txt"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny_text.write_files(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def rte(files, tmp_path_factory):
    """The folder and the result of a complete run with two seeds on RTE, whose examples are pairs of sentences."""
    folder = tmp_path_factory.mktemp("run") / "rte"
    values = {"seeds": (0, 1), "data.holdout": 8, "log.evaluate_every": 2}
    return folder, train_run(tiny_text.make_config(files, **LOUD, **values), folder)


@pytest.fixture(scope="module")
def stsb(files, tmp_path_factory):
    """The folder and the result of a complete run on STS-B, whose labels are scores.

    A warning of Matplotlib is an error here: without an accuracy, the curves must have no empty legend.
    """
    folder = tmp_path_factory.mktemp("run") / "stsb"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="surm_jax")
        return folder, train_run(tiny_text.make_config(files, "stsb", **LOUD, **{"log.metrics_every": 1}), folder)


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapted(folder):
    """Return the job of a run with one seed, and its model with the trained adapter."""
    job = prepare(saved_config(folder), saved_config(folder).seeds[0])
    model, _ = load_adapter(folder / "adapter", job.base_model())
    return job, model


def test_two_seeds_and_what_was_held_out(rte):
    folder, result = rte
    assert result == json.loads((folder / "result.json").read_text())
    assert (result["seeds"], result["metric"]) == ([0, 1], "test_accuracy")
    assert result["classes"] == ["entailment", "not_entailment"]
    assert (result["steps"], result["examples"]) == (4, {"test": 21})
    assert result["metrics"].keys() == {"test_accuracy", "test_loss"}
    for measured in result["metrics"].values():
        assert measured["mean"] == pytest.approx(np.mean(measured["seeds"]))
        assert measured["std"] == pytest.approx(np.std(measured["seeds"], ddof=1))
    losses = result["metrics"]["test_loss"]["seeds"]
    assert losses[0] != losses[1]
    lines = metrics_of(folder / "seed-1")
    assert [line["step"] for line in lines if {"holdout_accuracy", "holdout_loss"} <= line.keys()] == [2, 4]
    assert not any(name.startswith("test") for line in lines for name in line)
    # The trained parameters are two vectors of 32 entries in each of three layers, and the new head.
    assert result["parameters"]["trainable"] == 3 * 2 * 32 + 2 * 32 + 2


@pytest.mark.exhaustive
def test_evaluating_gives_the_result_again(rte):
    folder, result = rte
    measured = evaluate_run(folder, {})
    for place, seed in enumerate((0, 1)):
        assert measured[seed]["test"]["examples"] == 21
        for name in ("accuracy", "loss"):
            expected = result["metrics"][f"test_{name}"]["seeds"][place]
            assert measured[seed]["test"][name] == pytest.approx(expected, rel=1e-6)


def test_the_measured_numbers_are_those_of_each_example_alone(rte, files):
    folder, result = rte
    job, model = adapted(folder / "seed-0")
    source = job.task.dataset.tests["test"]
    logits = tiny_text.logits_one_by_one(model, files / "bert", source.sentences).astype(np.float64)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(21), source.labels]
    assert result["metrics"]["test_loss"]["seeds"][0] == pytest.approx(losses.mean(), rel=1e-5)
    assert result["metrics"]["test_accuracy"]["seeds"][0] == pytest.approx((logits.argmax(1) == source.labels).mean())


@pytest.mark.exhaustive
def test_scores_have_no_accuracy_and_their_loss_is_the_squared_error(stsb, files):
    folder, result = stsb
    assert (result["classes"], result["metric"]) == ([], "test_spearman")
    assert result["metrics"].keys() == {"test_spearman", "test_pearson", "test_loss"}
    lines = metrics_of(folder)
    assert sum("train_loss" in line for line in lines) == 4
    assert not any("accuracy" in name for line in lines for name in line)
    job, model = adapted(folder)
    source = job.task.dataset.tests["test"]
    predictions = tiny_text.logits_one_by_one(model, files / "bert", source.sentences)
    assert predictions.shape == (21, 1)
    assert result["metrics"]["test_loss"] == pytest.approx(np.mean((predictions[:, 0] - source.labels) ** 2), rel=1e-5)
    assert result["metrics"]["test_pearson"] == pytest.approx(
        np.corrcoef(predictions[:, 0], source.labels)[0, 1], rel=1e-4
    )
    assert evaluate_run(folder, {})[0]["test"]["spearman"] == pytest.approx(result["metrics"]["test_spearman"])


@pytest.mark.exhaustive
def test_two_test_sets(files, tmp_path):
    config = tiny_text.make_config(files, "mnli", "linear_probe", **{"optim.steps": 2})
    result = train_run(config, tmp_path)
    assert result["metric"] == "test_matched_accuracy"
    assert list(result["metrics"]) == [
        "test_matched_accuracy", "test_matched_loss", "test_mismatched_accuracy", "test_mismatched_loss",
    ]  # fmt: skip
    assert result["examples"] == {"test_matched": 21, "test_mismatched": 21}
    assert result["metrics"]["test_matched_loss"] != result["metrics"]["test_mismatched_loss"]
    measured = evaluate_run(tmp_path, {})[0]
    assert list(measured) == ["test_matched", "test_mismatched"]
    for split, values in measured.items():
        assert values["loss"] == pytest.approx(result["metrics"][f"{split}_loss"], rel=1e-6)


def test_single_sentences_by_their_own_metric(files, tmp_path):
    config = tiny_text.make_config(files, "cola", "linear_probe", **{"optim.steps": 2, "log.evaluate_every": 1})
    result = train_run(config, tmp_path)
    assert (result["metric"], -1 <= result["metrics"]["test_matthews"] <= 1) == ("test_matthews", True)
    assert [line["step"] for line in metrics_of(tmp_path) if "test_matthews" in line] == [1, 2]


def test_steps_follow_from_epochs(files):
    # 1.3 passes over 32 examples in batches of 16 are 2.6 steps, which is rounded up.
    config = tiny_text.make_config(files, **{"optim.epochs": 1.3, "data.holdout": 8})
    assert prepare(config, 0).config.optim.steps == 3


@pytest.mark.exhaustive
def test_an_interrupted_run_ends_like_one_that_was_not(files, tmp_path, monkeypatch):
    # Examples are sorted by length within windows of 16 batches. The run is interrupted in the first window, and ends
    # in the second.
    values = {"optim.steps": 20, "optim.warmup_ratio": 0.2, "log.metrics_every": 1, "log.evaluate_every": 10}
    config = tiny_text.make_config(files, **LOUD, **values, **{"data.holdout": 8})
    train_run(config, tmp_path / "whole")
    put, step = loop.put_batch, 0

    def put_batch(*arguments):
        nonlocal step
        step += 1
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return put(*arguments)

    monkeypatch.setattr(loop, "put_batch", put_batch)
    with pytest.raises(InterruptedRunError, match="SIGTERM: saved step 7 of 20"):
        train_run(config, tmp_path / "parts")
    monkeypatch.undo()
    train_run(config, tmp_path / "parts")
    tiny.assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.exhaustive
def test_one_program_for_each_length_and_none_while_training(files, tmp_path, monkeypatch, caplog, capsys):
    put, during, lengths = loop.put_batch, [], set()

    def put_batch(batch, mesh):
        lengths.add(batch["tokens"].shape[1])
        during.append([record.getMessage() for record in caplog.records])
        return put(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", put_batch)
    config = tiny_text.make_config(files, **LOUD, **{"optim.steps": 16})
    with caplog.at_level(logging.WARNING), jax.log_compiles(True):
        train_run(config, tmp_path)
    compiled = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Compiling ")]
    steps = [message for message in compiled if "train_step" in message]
    assert lengths == {11, 20} and len(steps) == 2
    assert re.findall(r"compiled for batches of (\d+) tokens in", capsys.readouterr().err) == ["11", "20"]
    # From the first batch to the last, JAX compiles nothing, not even a single operation.
    new = during[-1][len(during[0]) :]
    assert [message for message in new if message.startswith("Compiling ")] == []
    assert len([message for message in compiled if "eval_step" in message]) == len(
        {batch["tokens"].shape for batch in prepare(config, 0).task.eval_batches("test")}
    )


def test_padding_changes_nothing(stsb, files):
    folder, _ = stsb
    job, model = adapted(folder)
    alone = tiny_text.logits_one_by_one(model, files / "bert", job.task.dataset.tests["test"].sentences)[:, 0]
    with jax.set_mesh(job.mesh):
        parts, trained, frozen = partition(*load_adapter(folder / "adapter", job.base_model()))
        trained, frozen = jax.device_put((trained, frozen), replicated(job.mesh))
        step = make_eval_step(parts, job.task.forward, job.task.objective, job.mesh)
        together, lengths, filled = np.full(21, np.nan), set(), 0
        for batch in job.task.eval_batches("test"):
            predictions = np.asarray(step(trained, frozen, put_batch(batch, job.mesh))["prediction"])
            assert np.isfinite(predictions).all()
            together[batch["index"][batch["mask"]]] = predictions[batch["mask"]]
            lengths.add(batch["tokens"].shape[1])
            filled += (~batch["token_mask"]).sum()
    assert len(lengths) > 1 and filled > 20 and alone.std() > 1e-2
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6 * np.abs(alone).max())


@pytest.mark.exhaustive
def test_a_merged_model_stands_alone(rte, files, capsys):
    folder, _ = rte
    paths = merge_run(folder, {})
    job, model = adapted(folder / "seed-1")
    merged = load(paths[1], lambda: Bert(job.task.model_config, rngs=nnx.Rngs(9)), fresh=())
    sentences = job.task.dataset.tests["test"].sentences[:2]
    expected, base, plain = (
        tiny_text.logits_one_by_one(one, files / "bert", sentences) for one in (model, job.base_model(), merged)
    )
    np.testing.assert_allclose(plain, expected, rtol=0, atol=1e-5)
    assert np.abs(expected - base).max() > 1e-2
    assert "logits of 8 test examples within" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_an_exported_folder_is_a_base_again(rte, files, tmp_path):
    folder, _ = rte
    assert export_run(folder, {}, "hf") == [folder / f"seed-{seed}" / "hf" for seed in (0, 1)]
    exported = folder / "seed-0" / "hf"
    assert {path.name for path in exported.iterdir()} == {
        "config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json",
    }  # fmt: skip
    job = prepare(tiny_text.make_config(files, **{"model.checkpoint": str(exported)}), 0)
    assert job.task.checkpoint == exported
    np.testing.assert_array_equal(
        job.base_model().blocks[0].attention.query.kernel[...],
        from_pretrained(exported).blocks[0].attention.query.kernel[...],
    )


@pytest.mark.parametrize("task", ["rte", "stsb"])
def test_transformers_gives_our_logits(task, request):
    torch = pytest.importorskip("torch", reason=PEERS)
    transformers = pytest.importorskip("transformers", reason=PEERS)
    peft = pytest.importorskip("peft", reason=PEERS)
    folder, _ = request.getfixturevalue(task)
    for form in ("hf", "peft"):
        export_run(folder, {}, form)
    folder = folder / "seed-0" if task == "rte" else folder
    job, model = adapted(folder)
    sentences = job.task.dataset.tests["test"].sentences
    expected = tiny_text.logits_one_by_one(model, job.task.checkpoint, sentences)
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "hf")
    assert whole.config.num_labels == len(job.task.classes) or (task, whole.config.num_labels) == ("stsb", 1)
    if task == "rte":
        assert whole.config.id2label == {0: "entailment", 1: "not_entailment"}
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        job.task.checkpoint, num_labels=whole.config.num_labels, ignore_mismatched_sizes=True
    )
    tokens = transformers.AutoTokenizer.from_pretrained(folder / "hf")(
        [list(pair) for pair in sentences], padding=True, truncation=True, max_length=20, return_tensors="pt"
    )
    for theirs in (whole.eval(), peft.PeftModel.from_pretrained(base, folder / "peft").eval()):
        with torch.no_grad():
            logits = theirs(**tokens).logits.numpy()
        assert np.linalg.norm(logits - expected) <= 1e-5 * np.linalg.norm(expected)


def refusal(config):
    with pytest.raises(UserError) as error:
        prepare(config, 0)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("task", "values", "parts"),
    [
        ("rte", {"data.lengths": (8, 200)}, ["config.data.lengths goes up to 200", "positions for 130"]),
        ("stsb", {"optim.label_smoothing": 0.1}, ["label_smoothing=0.1", "glue/stsb has no classes", "set it to 0"]),
        ("rte", {"model.checkpoint": "none"}, ["config.model.variant is empty"]),
        (
            "rte",
            {"model.checkpoint": "none", "model.variant": "tiny"},
            ["config.model.checkpoint=none", "no tokeniser"],
        ),
        ("rte", {"model.image_size": 32}, ["config.model.image_size=32", "a Bert, which reads text, has none"]),
        ("rte", {"model.num_classes": 3}, ["config.model.num_classes=3", "asks for 2"]),
        ("rte", {"model.variant": "base"}, ["says itself which model it holds"]),
        ("rte", {"data.holdout": 40}, ["hold out 40", "40"]),
        ("rte", {"data.train_examples": 41}, ["cannot train on 41", "40"]),
        ("rte", {"data.classes": ("entailment", "neutral")}, ["config.data.classes", "glue/rte is text"]),
        ("rte", {"data.name": "glue/rtr"}, ["not a task of GLUE", "did you mean 'rte'"]),
        ("rte", {"data.lengths": (4,)}, ["max_length is 4", "at least 8"]),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_compiled(files, task, values, parts):
    message = refusal(tiny_text.make_config(files, task, **values))
    assert [part for part in parts if part not in message] == []


def test_a_folder_without_a_tokeniser_or_with_another_models(files, tmp_path):
    for path in (files / "bert").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = tiny_text.make_config(files, **{"model.checkpoint": str(tmp_path)})
    words = (tmp_path / "vocab.txt").read_text()
    (tmp_path / "vocab.txt").write_text(words + "fish\n")
    message = refusal(config)
    assert f"the tokeniser in {tmp_path} is of another model: it has 20 tokens" in message
    assert "the model knows 19" in message
    # Reverse the vocabulary, so that the padding token has another index.
    (tmp_path / "vocab.txt").write_text("".join(reversed(words.splitlines(keepends=True))))
    assert "pads with number 18, but the model knows 19 and expects 0" in refusal(config)
    (tmp_path / "vocab.txt").unlink()
    assert f"{tmp_path} has no tokenizer: expected tokenizer.json, or vocab.txt" in refusal(config)


def test_models_and_data_of_two_kinds(files, tmp_path):
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text('{"model_type": "vit"}')
    message = refusal(tiny_text.make_config(files, **{"model.checkpoint": str(tmp_path / "vit")}))
    assert "holds a ViT, which reads images, but config.data.name asks for a model of text" in message
    message = refusal(tiny_text.make_config(files, **{"data.name": "digits"}))
    assert "holds a Bert, which reads text, but config.data.name asks for a model of images" in message
    message = refusal(tiny_text.make_config(files, **{"model.variant": "B/16", "model.checkpoint": "none"}))
    assert "no model of text 'B/16'; there are" in message and "'base'" in message


@pytest.mark.exhaustive
def test_real_sentences(shared, files, tmp_path, monkeypatch):
    read = data.load

    def load_few(*arguments):
        dataset = read(*arguments)
        few = {name: source.select(range(21)) for name, source in dataset.tests.items()}
        return dataclasses.replace(dataset, train=dataset.train.select(range(32)), tests=few)

    monkeypatch.setattr(data, "load", load_few)
    values = {"data.dir": str(shared / "tfds"), "data.lengths": (64,), "optim.steps": 2}
    result = train_run(tiny_text.make_config(files, "rte", **values), tmp_path)
    assert (result["classes"], result["examples"]) == (["entailment", "not_entailment"], {"test": 21})
    assert evaluate_run(tmp_path, {})[0]["test"]["loss"] == pytest.approx(result["metrics"]["test_loss"], rel=1e-6)
