"""Check that a run notices if the files that it reads have changed since its start, and that they may be moved."""

import json
import shutil

import numpy as np
import pytest

from surm_jax.errors import UserError
from surm_jax.record.workdir import read_result
from surm_jax.training.answers import predict_run
from surm_jax.training.modes import evaluate_run, export_run, merge_run, train_run
from surm_jax.training.parsing import saved_config
from tests.training import tiny, tiny_text


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A folder with a complete run (`run`) and its data and weights (`files`), which it names by relative paths."""
    folder = tmp_path_factory.mktemp("identity")
    (folder / "files").mkdir()
    tiny.write_files(folder / "files")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "files")
        train_run(relative_config(), folder / "run")
    return folder


@pytest.fixture
def run(complete, tmp_path):
    """A copy of `complete` that a test may change."""
    for name in ("files", "run"):
        shutil.copytree(complete / name, tmp_path / name)
    for name in ("config.json", "inputs.json"):
        path = tmp_path / "run" / name
        path.write_text(path.read_text().replace(str(complete), str(tmp_path)))
    return tmp_path


def relative_config(**values):
    return tiny.make_config(
        tiny.Path("."), "lora", **{"data.name": "data.npz", "model.checkpoint": "weights.safetensors", **values}
    )


def change(path, **arrays):
    with np.load(path) as archive:
        old = dict(archive)
    np.savez(path, **{**old, **arrays})


def swapped_labels(path):
    with np.load(path) as archive:
        return {"test_labels": (archive["test_labels"] + 1) % 3}


OTHER = r"run has read something else: there .*{}"


def test_a_run_is_evaluated_and_resumed_from_any_folder(run, monkeypatch):
    config = saved_config(run / "run")
    assert config.data.name == str(run / "files" / "data.npz")
    assert config.model.checkpoint == str(run / "files" / "weights.safetensors")
    monkeypatch.chdir(run)
    assert evaluate_run(run / "run", {})[0]["test"]["accuracy"] == read_result(run / "run")["metrics"]["test_accuracy"]
    (run / "run" / "result.json").unlink()
    train_run(relative_config(), run / "run")
    # Outside of the run's folder, no file holds a path.
    (exported,) = export_run(run / "run", {}, "peft")
    for file in (*exported.iterdir(), *(run / "run" / "adapter").iterdir(), run / "run" / "result.json"):
        assert str(run).encode() not in file.read_bytes()


def test_other_data_at_the_same_place_are_noticed(run):
    change(run / "files" / "data.npz", **swapped_labels(run / "files" / "data.npz"))
    config = saved_config(run / "run")
    modes = [evaluate_run, merge_run, lambda *given: export_run(*given, "hf")]
    for mode in (*modes, lambda *_: train_run(config, run / "run")):
        with pytest.raises(UserError, match=OTHER.format(rf"data is '.* bytes.*\({run}/files/data\.npz\)")):
            mode(run / "run", {})
    (run / "run" / "result.json").unlink()
    with pytest.raises(UserError, match=OTHER.format("data is")):
        train_run(config, run / "run")


def test_the_name_of_a_label_is_noticed(run):
    change(run / "files" / "data.npz", classes=np.array(["0", "1", "two"]))
    with pytest.raises(UserError, match=OTHER.format("label names.2 is '2', here 'two'")):
        evaluate_run(run / "run", {})


def test_the_same_command_elsewhere_is_another_run(run, monkeypatch):
    shutil.copytree(run / "files", run / "b")
    monkeypatch.chdir(run / "b")
    (run / "files" / "weights.safetensors").unlink()
    (run / "b" / "weights.safetensors").rename(run / "files" / "weights.safetensors")
    # Equal data at another place is accepted, and its place is recorded.
    train_run(relative_config(), run / "run")
    assert saved_config(run / "run").data.name == str(run / "b" / "data.npz")
    assert json.loads((run / "run" / "inputs.json").read_text())["data"]["path"] == str(run / "b" / "data.npz")
    change(run / "files" / "data.npz", **swapped_labels(run / "b" / "data.npz"))
    monkeypatch.chdir(run / "files")
    places = rf"\({run}/b/data\.npz, here {run}/files/data\.npz\)"
    for complete in (True, False):
        if not complete:
            (run / "run" / "result.json").unlink()
        before = (run / "run" / "config.json").read_bytes()
        with pytest.raises(UserError, match=OTHER.format(places)):
            train_run(relative_config(), run / "run")
        assert (run / "run" / "config.json").read_bytes() == before


def test_moved_data_are_pointed_to(run, monkeypatch):
    (run / "files" / "data.npz").rename(run / "moved.npz")
    with pytest.raises(UserError, match="no data file"):
        evaluate_run(run / "run", {})
    expected = read_result(run / "run")["metrics"]["test_accuracy"]
    monkeypatch.chdir(run)
    assert evaluate_run(run / "run", {"data.name": "moved.npz"})[0]["test"]["accuracy"] == expected
    change(run / "moved.npz", **swapped_labels(run / "moved.npz"))
    with pytest.raises(UserError, match=OTHER.format(rf"\({run}/files/data\.npz, here {run}/moved\.npz\)")):
        evaluate_run(run / "run", {"data.name": "moved.npz"})


def test_the_result_is_that_of_the_weights_at_that_place(run):
    config = saved_config(run / "run")
    path = run / "files" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"abcd")
    with pytest.raises(UserError, match=OTHER.format("weights is")):
        train_run(config, run / "run")
    path.unlink()
    (run / "files" / "data.npz").unlink()
    assert train_run(config, run / "run") == read_result(run / "run")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "files").mkdir()
    files = tiny_text.write_files(folder / "files")
    train_run(tiny_text.make_config(files, "rte", "linear_probe", **{"optim.steps": 1}), folder / "run")
    (folder / "in.tsv").write_text("the cat\ta dog\n")
    return folder


@pytest.mark.parametrize(
    ("file", "old", "new", "named"),
    [
        ("vocab.txt", "cat\ndog", "dog\ncat", "tokenizer"),
        ("config.json", '"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-05', "model.epsilon"),
    ],
)
def test_another_tokenizer_or_model_is_noticed(text, file, old, new, named):
    path = text / "files" / "bert" / file
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new))
    try:
        for mode in (evaluate_run, lambda *given: predict_run(*given, text / "in.tsv", text / "out.tsv")):
            with pytest.raises(UserError, match=OTHER.format(named)):
                mode(text / "run", {})
    finally:
        path.write_text(content)
    assert not (text / "out.tsv").exists()


def test_tables_of_prepared_sets_may_move_but_not_change(text, tmp_path):
    shutil.copytree(text / "files" / "tfds", tmp_path / "tfds")
    assert evaluate_run(text / "run", {"data.dir": str(tmp_path / "tfds")}) == evaluate_run(text / "run", {})
    labels = tmp_path / "tfds" / "glue" / "rte" / "2.0.0"
    (path,) = [path for path in labels.iterdir() if path.name.endswith(".labels.txt")]
    path.write_text("\n".join(reversed(path.read_text().split())) + "\n")
    with pytest.raises(UserError, match=OTHER.format("label names.0 is 'entailment', here 'not_entailment'")):
        evaluate_run(text / "run", {"data.dir": str(tmp_path / "tfds")})


@pytest.mark.exhaustive
def test_a_plugin_is_found_and_compared(tiny_files, tmp_path, monkeypatch):
    name = "surm_jax_identity_plugin"
    (tmp_path / f"{name}.py").write_text("x = 1\n")
    monkeypatch.chdir(tmp_path)
    train_run(tiny.make_config(tiny_files, "linear_probe", **{"plugins": (name,), "seeds": (0, 1)}), tmp_path / "run")
    import sys

    del sys.modules[name]
    sys.path.remove(str(tmp_path))
    monkeypatch.chdir("/")
    (tmp_path / f"{name}.py").write_text("x = 20\n")
    with pytest.warns(UserWarning, match=f"another version of the plugin {name} is '6 bytes"):
        evaluate_run(tmp_path / "run", {})
