import dataclasses
import json
import os
from pathlib import Path

import pytest

from surm_jax.errors import UserError
from surm_jax.files import read_json
from surm_jax.record.workdir import default_workdir, open_workdir, read_result, save_config, write_json
from surm_jax.training.config import RunConfig
from surm_jax.training.parsing import base_config, complete, parse, saved_config, to_dict

CONFIG = RunConfig()


def changed(**values):
    config = base_config()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
    return parse(config)


def opened(folder, config):
    """Open the folder of a run with a configuration, and close it."""
    with open_workdir(folder, to_dict(config), complete):
        pass


def begun(folder, config=CONFIG):
    """Make the folder of a run that has begun to train, which holds more than the configuration."""
    opened(folder, config)
    (folder / "metrics.jsonl").write_text("")


def test_a_new_folder_has_the_whole_configuration(tmp_path):
    config = changed(peft__lora__rank=3, seeds=(4,), optim__steps=12)
    opened(tmp_path / "a" / "b", config)
    assert saved_config(tmp_path / "a" / "b") == config
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text())["peft"]["lora"]["rank"] == 3
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["config.json"]


def test_an_empty_folder_and_the_same_run_are_welcome(tmp_path):
    opened(tmp_path, CONFIG)
    (tmp_path / "metrics.jsonl").write_text("")
    before = (tmp_path / "config.json").read_bytes()
    opened(tmp_path, dataclasses.replace(CONFIG))
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_start_that_failed_leaves_the_folder_free(tmp_path):
    opened(tmp_path, CONFIG)
    opened(tmp_path / "seed-0", CONFIG)
    (tmp_path / ".config.json.0123abcd.tmp").write_text("{")
    (tmp_path / "inputs.json").write_text("{}")
    opened(tmp_path, changed(optim__steps=7))
    assert saved_config(tmp_path).optim.steps == 7 and not (tmp_path / "inputs.json").exists()


def test_data_and_weights_may_move(tmp_path):
    begun(tmp_path)
    elsewhere = changed(data__dir="/elsewhere", data__name="/my.npz", model__checkpoint="/other.npz")
    opened(tmp_path, elsewhere)
    # The new places are saved only when the run has checked what it reads there.
    assert saved_config(tmp_path) == CONFIG
    save_config(tmp_path, to_dict(elsewhere))
    moved = saved_config(tmp_path, {"data.dir": "/third"})
    assert (moved.data.dir, moved.data.name, moved.optim) == ("/third", "/my.npz", CONFIG.optim)
    with pytest.raises(UserError, match=r"config\.optim\.steps belongs to the run"):
        saved_config(tmp_path, {"optim.steps": 3})
    # An override with the value that the run already has is allowed.
    same = {"optim.steps": CONFIG.optim.steps, "peft.lora.rank": CONFIG.peft.methods["lora"].rank, "seeds": (0,)}
    assert saved_config(tmp_path, same) == saved_config(tmp_path)


@pytest.mark.parametrize("where", ["", "seed-1"])
def test_a_result_is_that_of_its_weights(tmp_path, where):
    for folder in dict.fromkeys((tmp_path, tmp_path / where)):
        begun(folder)
    write_json(tmp_path / where / "result.json", {})
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(
        UserError, match=r"another run; there config\.model\.checkpoint is 'augreg', here '/other\.npz'"
    ):
        opened(tmp_path, changed(model__checkpoint="/other.npz"))
    assert (tmp_path / "config.json").read_bytes() == before
    # Evaluation with other weights is allowed, because it checks their fingerprint.
    assert saved_config(tmp_path, {"model.checkpoint": "/other.npz"}).model.checkpoint == "/other.npz"


def test_other_devices_may_go_on(tmp_path):
    begun(tmp_path)
    other = changed(mesh__fsdp=2, model__remat="block", data__eval_batch_size=8)
    opened(tmp_path, other)
    save_config(tmp_path, to_dict(other))
    assert saved_config(tmp_path).mesh.fsdp == 2
    assert saved_config(tmp_path, {"mesh.fsdp": 1}).mesh.fsdp == 1


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"optim__steps": 7}, r"config\.optim\.steps is 1000, here 7"),
        ({"peft__lora__rank": 2}, r"config\.peft\.lora\.rank is 1, here 2"),
        ({"seeds": (1,)}, r"config\.seeds is \[0\], here \[1\]"),
        ({"optim__groups__head__learning_rate": 0.1}, r"config\.optim\.groups\.head\.learning_rate is 0\.0, here 0\.1"),
    ],
)
def test_another_run_is_refused_by_what_differs(tmp_path, values, named):
    begun(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError, match=f"holds another run; there {named}") as error:
        opened(tmp_path, changed(**values))
    assert str(error.value).endswith("Choose another folder, or delete that one")
    assert (tmp_path / "config.json").read_bytes() == before


def test_many_differences_are_counted(tmp_path):
    begun(tmp_path)
    many = changed(optim__steps=7, seeds=(1,), data__name="x", data__augment="none", model__dtype="bfloat16",
                   peft__method="lora", log__metrics_every=1)  # fmt: skip
    with pytest.raises(UserError, match="and 1 more"):
        opened(tmp_path, many)


def test_files_of_something_else_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(UserError, match=r"holds files but no run \(no config\.json\)"):
        opened(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("below", ["", "run"])
def test_a_file_is_no_folder(tmp_path, below):
    (tmp_path / "file").write_text("content")
    with pytest.raises(UserError, match=f"{tmp_path}/file.* (is a file|lies below a file)"):
        opened(tmp_path / "file" / below, CONFIG)
    assert (tmp_path / "file").read_text() == "content"


@pytest.mark.parametrize("folder", ["/proc/self", "/proc/runs/a"])
def test_a_folder_that_cannot_be_written(folder):
    # These folders are in /proc, where not even root can write.
    with pytest.raises(UserError, match=f"{folder} cannot be written .*: choose another folder"):
        opened(Path(folder), CONFIG)


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(UserError, match=f"no run in {tmp_path}/nothing"):
        saved_config(tmp_path / "nothing")


@pytest.mark.parametrize(
    "content", ['{"seeds": [0', "", "[1]", "\x00\xff", '{"seads": [0]}', '{"optim": {"steps": 0}}']
)
def test_a_damaged_configuration_is_told_by_its_file(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"{tmp_path}/config.json"):
        saved_config(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path}/config.json"):
        opened(tmp_path, CONFIG)


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert read_json(path) == {"a": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"cannot write .*result\.json: No space left on device"):
        write_json(path, {"a": 3})
    assert read_json(path) == {"a": 2}


def test_a_run_without_a_result_is_not_complete(tmp_path):
    with pytest.raises(UserError, match=rf"the run in {tmp_path} is not complete .*: there is no .*result\.json"):
        read_result(tmp_path)


def test_the_default_folder_names_the_run():
    assert default_workdir("digits", {}) == Path("runs/digits")
    named = default_workdir("vit", {"peft.method": "lora", "optim.steps": 3})
    assert named == Path("runs/vit,optim.steps=3,peft.method=lora")
    # The names are different if runs differ only in characters that a file name cannot hold, or in the end of a long
    # name.
    awkward = [{"peft.target": r"blocks/\d/(a|b)"}, {"peft.target": "blocks/d/(ab)"}]
    awkward += [{"data.name": "x" * 500, "peft.method": method} for method in ("lora", "full")]
    names = [default_workdir("vit", overrides) for overrides in awkward]
    assert len(set(names)) == 4
    assert all(name.parent == Path("runs") and len(name.name) <= 200 for name in names)
    # The folder of prepared sets and the devices are not part of the name, but the data set and the checkpoint are.
    elsewhere = {"data.dir": "/data", "mesh.fsdp": 8, "data.name": "digits", "model.checkpoint": "none"}
    assert default_workdir("vit", elsewhere) == Path("runs/vit,data.name=digits,model.checkpoint=none")
