import json
import os
import shutil
import signal

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from surm_jax import data
from surm_jax.errors import UserError
from surm_jax.models import ViT
from surm_jax.peft import load_adapter
from surm_jax.pretrained import image_normalization, load
from surm_jax.record import curves
from surm_jax.training import modes
from surm_jax.training.modes import describe_run, evaluate_run, export_run, merge_run, train_run
from surm_jax.training.parsing import base_config, parse
from surm_jax.training.run import InterruptedRunError
from surm_jax.training.setup import prepare
from tests.training import tiny


@pytest.fixture(scope="module")
def run(tiny_files, tmp_path_factory):
    """The folder, the configuration and the result of a complete run with two seeds.

    Its learning rate is high, so that training changes the logits clearly.
    """
    folder = tmp_path_factory.mktemp("run") / "two"
    values = {"seeds": (0, 2), "optim.steps": 3, "optim.learning_rate.circulant": 0.1}
    config = tiny.make_config(tiny_files, **values)
    return folder, config, train_run(config, folder)


def test_seeds_have_folders_of_their_own_and_one_result(run):
    folder, _, result = run
    assert {path.name for path in folder.iterdir()} == {"config.json", "result.json", "seed-0", "seed-2"}
    assert result == json.loads((folder / "result.json").read_text())
    assert result["seeds"] == [0, 2]
    single = [json.loads((folder / f"seed-{seed}" / "result.json").read_text()) for seed in (0, 2)]
    for name in ("test_accuracy", "test_loss"):
        values = [one["metrics"][name] for one in single]
        assert result["metrics"][name]["seeds"] == values
        assert result["metrics"][name]["mean"] == pytest.approx(np.mean(values))
        assert result["metrics"][name]["std"] == pytest.approx(np.std(values, ddof=1))
    assert single[0]["metrics"]["test_loss"] != single[1]["metrics"]["test_loss"]


def test_a_complete_run_comes_back_at_once(run, monkeypatch, capsys):
    folder, config, result = run

    def fail(*_):
        raise AssertionError("nothing is to be trained")

    monkeypatch.setattr(modes, "prepare", fail)
    assert train_run(config, folder) == result
    table = capsys.readouterr().out
    assert "circulant, seed 0" in table and "circulant, seed 2" in table and "circulant, mean" in table
    assert "±" in table and str(folder) in table


def test_evaluating_gives_the_result_again(run, capsys):
    folder, _, result = run
    evaluations = evaluate_run(folder, {})
    assert list(evaluations) == [0, 2]
    for position, measured in enumerate(evaluations.values()):
        assert measured["test"]["examples"] == 21
        assert measured["test"]["accuracy"] == result["metrics"]["test_accuracy"]["seeds"][position]
        assert measured["test"]["loss"] == pytest.approx(result["metrics"]["test_loss"]["seeds"][position], rel=1e-5)
    assert f"{folder / 'seed-2' / 'adapter'}: test_accuracy" in capsys.readouterr().out


def test_data_and_weights_may_have_moved(run, tiny_files, tmp_path):
    folder, _, result = run
    for name in ("data.npz", "weights.safetensors"):
        shutil.copy(tiny_files / name, tmp_path / name)
    moved = {"model.checkpoint": str(tmp_path / "weights.safetensors"), "data.dir": str(tmp_path)}
    assert evaluate_run(folder, moved)[0]["test"]["accuracy"] == result["metrics"]["test_accuracy"]["seeds"][0]
    with pytest.raises(UserError, match="no checkpoint"):
        evaluate_run(folder, {"model.checkpoint": str(tmp_path / "gone.safetensors")})
    for mode in (evaluate_run, merge_run):
        with pytest.raises(UserError, match=r"config\.data\.classes belongs to the run .*only data\.name, data\.dir"):
            mode(folder, {"data.classes": ("0", "1")})


@pytest.mark.exhaustive
def test_a_signal_between_two_seeds_is_not_lost(tiny_files, tmp_path, monkeypatch):
    config = tiny.make_config(tiny_files, "linear_probe", **{"seeds": (0, 1), "optim.steps": 1})
    draw = curves.draw_curves

    def draw_curves(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        draw(*arguments)

    monkeypatch.setattr(curves, "draw_curves", draw_curves)
    with pytest.raises(InterruptedRunError, match="SIGTERM"):
        train_run(config, tmp_path)
    assert not (tmp_path / "seed-1" / "result.json").exists()
    monkeypatch.undo()
    assert train_run(config, tmp_path)["seeds"] == [0, 1]


def test_a_merged_model_stands_alone_and_computes_the_same(run, capsys):
    folder, config, _ = run
    paths = merge_run(folder, {})
    assert paths == [folder / f"seed-{seed}" / "merged" / "model.safetensors" for seed in (0, 2)]
    assert "of the unmerged model's" in capsys.readouterr().out
    job = prepare(config, 2)
    merged = load(paths[1], lambda: ViT(job.task.model_config, rngs=nnx.Rngs(9)), fresh=())
    base = job.base_model()
    adapted, _ = load_adapter(folder / "seed-2" / "adapter", base)
    # The merged kernels differ from those of the base model, and the file holds no arrays of the adapter.
    query = load_file(paths[1])["blocks/0/attention/query/kernel"]
    assert np.abs(query - np.asarray(base.blocks[0].attention.query.kernel[...])).max() > 1e-3
    assert not [name for name in load_file(paths[1]) if "delta" in name]
    # The normalisation of images is saved with the model. Mean and standard deviation 0.5 give pixels in [-1, 1].
    assert image_normalization(paths[1]) == ((0.5,), (0.5,))
    images = next(iter(data.eval_batches(job.task.dataset.test, batch_size=8, image_size=8)))["image"]
    logits = [np.asarray(model(images)) for model in (merged, adapted, base)]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)
    assert np.abs(logits[0] - logits[2]).max() > 1e-2


def test_a_damaged_or_missing_adapter_is_told(run, tmp_path):
    folder, _, _ = run
    tensors = folder / "seed-0" / "adapter" / "adapter_model.safetensors"
    content = tensors.read_bytes()
    try:
        tensors.write_bytes(content[:-7])
        for mode in (evaluate_run, merge_run):
            with pytest.raises(UserError, match=f"{tensors} .*is damaged"):
                mode(folder, {})
        tensors.unlink()
        with pytest.raises(UserError, match=f"cannot read {tensors}"):
            evaluate_run(folder, {})
    finally:
        tensors.write_bytes(content)
    with pytest.raises(UserError, match=f"no run in {tmp_path}"):
        evaluate_run(tmp_path, {})


def test_what_is_not_complete_is_told_before_anything_is_loaded(run, monkeypatch):
    folder, _, _ = run
    result = folder / "seed-2" / "result.json"
    content = result.read_bytes()

    def fail(*_):
        raise AssertionError("nothing is to be loaded")

    monkeypatch.setattr(modes, "prepare", fail)
    try:
        result.unlink()
        for mode in (evaluate_run, merge_run, lambda *given: export_run(*given, "hf")):
            with pytest.raises(UserError, match=rf"the run in {result.parent} is not complete \(the training command"):
                mode(folder, {})
    finally:
        result.write_bytes(content)


def test_describing_needs_neither_weights_nor_data(capsys):
    config = base_config()
    config.model.num_classes = 10
    config.data.name = "nowhere.npz"
    # "augreg" means the official weights. They cannot be downloaded in this test, and so must not be needed.
    assert config.model.checkpoint == "augreg"
    describe_run(parse(config))
    out = capsys.readouterr().out
    assert "blocks/11/attention/value" in out and "768 x 768" in out
    assert f"trainable: {12 * 3 * 2 * 768 + 7690:,} of" in out
    config.model.num_classes = 0
    with pytest.raises(UserError, match=r"nowhere\.npz"):
        describe_run(parse(config))


def test_describing_refuses_a_target_that_matches_nothing():
    config = base_config()
    config.model.num_classes = 10
    config.peft.target = r"blocks/\d+/attention/qeury"
    with pytest.raises(UserError, match=r"qeury.*blocks/0/attention/query"):
        describe_run(parse(config))
