"""The task to write the next token: its loss in pieces, weighted by tokens, and whole runs with every method."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from surm_jax.devices.mesh import make_mesh, put_base, put_batch
from surm_jax.errors import UserError
from surm_jax.models.decoder import Decoder
from surm_jax.models.decoder_config import DecoderConfig
from surm_jax.peft import LoRA, Rule, adapt
from surm_jax.pretrained import from_pretrained
from surm_jax.record.progress import Interruption
from surm_jax.tasks import CausalLM
from surm_jax.tasks.causal_lm import TOKENS
from surm_jax.tasks.objective import token_losses
from surm_jax.training.loop import train
from surm_jax.training.modes import evaluate_run, export_run, merge_run, train_run
from surm_jax.training.partition import partition
from surm_jax.training.setup import prepare
from surm_jax.training.step import init_state, make_train_step
from tests.speeds import fast
from tests.training import tiny, tiny_lm

KEY = jax.random.key(0)
SGD = optax.sgd(1.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny_lm.write_files(tmp_path_factory.mktemp("lm"))


@pytest.mark.parametrize(("batch", "tokens", "at_once"), fast(((3, 10, 12), (2, 7, 1), (4, 5, 1000)), unpack=True))
def test_the_loss_in_pieces_is_the_loss(batch, tokens, at_once):
    rng = np.random.default_rng(0)
    features, head = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((batch, tokens, 6), (6, 11)))
    labels = jnp.asarray(rng.integers(-1, 11, (batch, tokens)), jnp.int32)

    def whole(features, head):
        logits = features @ head
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return jnp.where(labels < 0, 0, losses), logits.argmax(-1)

    def pieces(features, head):
        return token_losses(lambda x: x @ head, features, labels, no_label=-1, at_once=at_once)

    results = []
    for losses_of in (whole, pieces):
        gradient = jax.grad(lambda *x, losses_of=losses_of: jnp.square(losses_of(*x)[0]).sum(), (0, 1))
        results.append(jax.jit(lambda *x, fn=losses_of, gradient=gradient: (*fn(*x), *gradient(*x)))(features, head))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def step_of(model, adapter, mesh, **options):
    parts, trained, frozen = partition(model, adapter)
    step = make_train_step(parts, CausalLM.outputs, TOKENS, SGD, mesh, **options)
    return step, init_state(trained, SGD, mesh), put_base(frozen, mesh)


@pytest.mark.parametrize("vocabulary", fast((20_000, 128_256), 20_000))
def test_the_logits_of_a_batch_are_never_in_memory(vocabulary):
    geometry = {**tiny_lm.GEOMETRY, "vocab_size": vocabulary, "depth": 1, "max_positions": 512, "remat": "block"}
    model = Decoder(DecoderConfig(**geometry), rngs=nnx.Rngs(0))
    model, adapter = adapt(model, [Rule("qv", LoRA(rank=1))], rngs=nnx.Rngs(0))
    mesh = make_mesh(1, {})
    step, state, frozen = step_of(model, adapter, mesh)
    part = jax.ShapeDtypeStruct((8, 512), jnp.int32)
    with jax.set_mesh(mesh):
        compiled = step.lower(state, frozen, dict.fromkeys(("tokens", "segments", "label"), part), KEY, {}).compile()
    logits = 8 * 512 * vocabulary * 4
    # Scores of attention take 8 x 4 x 512 x 512 x 4 bytes, a few times.
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * logits + 6 * 8 * 4 * 512 * 512 * 4


def one_step(files, mesh, **options):
    """The trained arrays and the metrics after one step, from adapters that are not zero."""
    job = prepare(tiny_lm.make_config(files), 0)
    model, adapter = job.adapt(job.base_model())
    rng = np.random.default_rng(1)
    for _, variable in nnx.to_flat_state(nnx.state(model, adapter.trainable)):
        variable[...] = jnp.asarray(rng.normal(size=variable.shape) / 4, variable.dtype)
    model = nnx.merge(*jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), nnx.split(model)))
    step, state, frozen = step_of(model, adapter, mesh, **options)
    batch = next(job.task.train_batches(0))
    with jax.set_mesh(mesh):
        state, metrics = step(state, frozen, put_batch(batch, mesh), KEY, {})
    return tiny.host(state.trained), {name: float(value) for name, value in metrics.items()}, batch


@pytest.mark.parametrize("case", fast(("2", "8", "8 devices", "fsdp"), "8", "8 devices"))
def test_micro_batches_and_devices_equal_one_batch(files, case):
    trained, metrics, batch = one_step(files, make_mesh(1, {}))
    counts = (batch["label"] >= 0).sum(1)
    assert counts.min() < counts.max(), "all rows have equally many labels: the test would see nothing"
    mesh = {"8 devices": lambda: make_mesh(8, {}), "fsdp": lambda: make_mesh(2, {}, 4)}.get(
        case, lambda: make_mesh(1, {})
    )()
    others, other_metrics, _ = one_step(files, mesh, accumulate=int(case) if case.isdigit() else 1)
    tiny.assert_close(trained, others, 2e-5)
    assert metrics == pytest.approx(other_metrics, rel=1e-4)


def test_packed_examples_do_not_see_each_other(files):
    task = prepare(tiny_lm.make_config(files), 0).task
    model = task.make_model(0)
    batch = next(task.train_batches(0))
    assert batch["segments"].max() > 2
    graphdef, state = nnx.split(model)
    losses_of = jax.jit(lambda state, batch: CausalLM.outputs(nnx.merge(graphdef, state), batch, None).losses)
    packed = np.asarray(losses_of(state, batch))
    for row in (0, 1):
        for segment in range(1, batch["segments"][row].max() + 1):
            places = batch["segments"][row] == segment
            alone = {name: np.full_like(array[:1], -(name == "label")) for name, array in batch.items()}
            for name, array in alone.items():
                array[0, : places.sum()] = batch[name][row, places]
            found = np.asarray(losses_of(state, alone))[0, : places.sum()]
            np.testing.assert_allclose(found, packed[row, places], atol=2e-5)
            assert np.count_nonzero(found) >= 2, "a word and the end are learned"


def test_a_run_learns_evaluates_resumes_merges_and_exports(files, tmp_path):
    config = tiny_lm.make_config(
        files, **{"optim.steps": 6, "log.checkpoint_every": 3, "log.metrics_every": 1, "optim.learning_rate.lora": 0.03}
    )
    result = train_run(config, tmp_path / "run")
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train_loss"] for line in logged if "train_loss" in line]
    assert losses[-1] < losses[0] - 0.05
    metrics = result["metrics"]
    assert metrics["holdout_perplexity"] == pytest.approx(math.exp(metrics["holdout_loss"]))
    assert result["examples"] == {"holdout": 6}
    again = evaluate_run(tmp_path / "run", {})[0]["holdout"]
    assert again["loss"] == pytest.approx(metrics["holdout_loss"], rel=1e-5)

    # The same run, interrupted after step 3.
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    (tmp_path / "resumed" / "result.json").unlink()
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "6")
    with Interruption() as interruption:
        train(config, 0, tmp_path / "resumed", interruption)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()

    (merged,) = merge_run(tmp_path / "run", {})
    (folder,) = export_run(tmp_path / "run", {}, "hf")
    assert_loads_in_transformers(folder, tmp_path / "run")
    # The merged model is a base again, because its tokenizer is beside it.
    again = tiny_lm.make_config(files, **{"model.checkpoint": str(merged)})
    assert prepare(again, 0).task.tokenizer.files[0].parent == merged.parent


RANKS = {  # The largest rank of a layer is 12, with which nothing is lost.
    "circulant": ({"peft.target": ".*/(key|value)"}, {"rank": 12}, 1e-4),
    "lora": ({"peft.lora.rank": 2}, {"rank": 3}, 1e-4),
    "low_displacement": ({}, {"rank": 1, "force": True}, 1),
}


@pytest.mark.parametrize("method", fast(RANKS, "circulant"))
def test_any_update_is_exported_as_lora(files, tmp_path, capsys, method):
    overrides, options, most = RANKS[method]
    overrides = {"optim.steps": 3, f"optim.learning_rate.{method}": 0.1, "log.metrics_every": 0, **overrides}
    train_run(tiny_lm.make_config(files, method, **overrides), tmp_path / "run")
    if method == "circulant":
        with pytest.raises(UserError, match=r"of rank 1, .*errors of up to 0.* is refused: .*--force"):
            export_run(tmp_path / "run", {}, "peft", rank=1)
        assert not (tmp_path / "run" / "peft").exists()
    capsys.readouterr()
    (folder,) = export_run(tmp_path / "run", {}, "peft", **options)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == options["rank"]
    printed = capsys.readouterr().out
    worst, change = (float(printed.split(words)[1].split()[0]) for words in ("of up to ", "relative error of "))
    assert worst <= most and change <= most
    assert method != "low_displacement" or (worst > 0.01 and change > 0.01)


def test_a_rank_goes_with_peft(tmp_path):
    for form, options in (("hf", {"rank": 4}), ("peft", {"rank": -1}), ("peft", {"force": True})):
        with pytest.raises(UserError, match="goes with --format=peft"):
            export_run(tmp_path, {}, form, **options)


@pytest.mark.exhaustive
def test_the_command_of_the_configuration_tunes_a_real_llama(shared, tmp_path):
    names, things = ("Lily", "Tom", "Ben", "Sue"), ("ball", "car", "cat", "dog", "bird")
    lines = [
        {"prompt": f"Once upon a time, {name} saw a {thing}.", "completion": f" {name} said, the {thing} is red."}
        for name in names
        for thing in things
    ]
    tiny_lm.write_lines(tmp_path / "lines.jsonl", lines[::2] * 4)
    tiny_lm.write_lines(tmp_path / "lines_test.jsonl", lines[1::2])
    command = [sys.executable, "launch.py", "--config=configs/llm_sft.py", f"--workdir={tmp_path / 'run'}"]
    command += [f"--config.model.checkpoint={shared / 'data/weights/stories260k'}"]
    command += [f"--config.data.name={tmp_path / 'lines.jsonl'}", "--config.data.lengths=(64,)"]
    command += ["--config.optim.epochs=0.0", "--config.optim.steps=60", "--config.mesh.data=1"]
    command += ["--config.optim.learning_rate.lora=0.01"]
    root = Path(__file__).resolve().parents[2]
    subprocess.run(command, cwd=root, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train_loss"] for line in logged if "train_loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    test = evaluate_run(tmp_path / "run", {})[0]["test"]
    assert test["loss"] < 1
    assert test["accuracy"] > 0.8
    merge_run(tmp_path / "run", {})
    (folder,) = export_run(tmp_path / "run", {}, "hf")
    assert_loads_in_transformers(folder, tmp_path / "run")


def assert_loads_in_transformers(folder, workdir):
    transformers = pytest.importorskip("transformers", reason="compares with transformers: requirements-peers.txt")
    torch = pytest.importorskip("torch")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = np.arange(3, 19)[None]
    expected = theirs(torch.tensor(tokens)).logits.detach().numpy()
    ours = from_pretrained(workdir / "merged" / "model.safetensors")(jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(ours, expected, atol=2e-4)
    assert transformers.AutoTokenizer.from_pretrained(folder).encode("red")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "method", ["circulant", "low_displacement", "dora", "bottleneck", "adapter_drop", "linear_probe", "bitfit", "hira"]
)
def test_a_method_of_each_kind(files, method, tmp_path):
    overrides = {"optim.steps": 2, "mesh.data": 1, "log.metrics_every": 1}
    overrides |= {"peft.adapter_drop.skip": 1, "peft.compacter.reduction": 3}
    if method == "linear_probe":
        overrides["peft.train"] = ("head/.*",)
    if method == "bitfit":
        with pytest.raises(UserError, match="matches no parameter"):  # A Llama has no biases.
            prepare(tiny_lm.make_config(files, method), 0)
        return
    result = train_run(tiny_lm.make_config(files, method, **overrides), tmp_path / "run")
    assert 0 <= result["metrics"]["holdout_accuracy"] <= 1
    evaluated = evaluate_run(tmp_path / "run", {})[0]["holdout"]
    assert evaluated["loss"] == pytest.approx(result["metrics"]["holdout_loss"], rel=1e-5)


@pytest.mark.parametrize("target", fast(("qv", "qkv", "attention", "mlp", "all-linear"), "all-linear"))
def test_every_preset(files, target):
    job = prepare(tiny_lm.make_config(files, **{"peft.target": target}), 0)
    _, adapter = job.adapt(job.task.make_model(0))
    assert adapter is not None


BAD = {
    "template": ({}, "has no chat template"),
    "long": ({}, "the prompt has .* tokens, but config.data.lengths ends with 32"),
    "empty": ({}, "line 41: completion is empty"),
    "context": ({"data.lengths": (16, 128)}, "up to 128 tokens, but the model has positions for 64"),
    "holdout": ({"data.holdout": 0}, "nothing to evaluate on"),
    "smoothing": ({"optim.label_smoothing": 0.1}, "has no classes"),
    "classes": ({"data.classes": ("a", "b")}, "leave it empty"),
    "head": ({"peft.train": ("heads/.*",)}, "heads"),
}
LINES = {
    "template": {"messages": [{"role": "assistant", "content": "red"}]},
    "long": {"prompt": "It rains." * 40, "completion": " red"},
    "empty": {"prompt": "a", "completion": ""},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(files, case, tmp_path):
    overrides, message = BAD[case]
    shutil.copytree(files, tmp_path / "job")
    if case in LINES:
        with (tmp_path / "job" / "lines.jsonl").open("a") as file:
            file.write(json.dumps(LINES[case]) + "\n")
    if case == "template":
        settings = tmp_path / "job" / "model" / "tokenizer_config.json"
        values = json.loads(settings.read_text())
        del values["chat_template"]
        settings.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as caught:
        prepare(tiny_lm.make_config(tmp_path / "job", **overrides), 0)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_larger_than_the_embedding(tmp_path):
    tiny_lm.write_files(tmp_path, vocab_size=300)
    with pytest.raises(UserError, match="has 400 tokens, but the model has embeddings of 300"):
        prepare(tiny_lm.make_config(tmp_path), 0)
