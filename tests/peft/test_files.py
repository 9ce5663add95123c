import dataclasses
import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save

from surm_jax.errors import UserError
from surm_jax.peft import LoRA, Rule, adapt, iter_parts, load_adapter, merge, save_adapter, set_scale
from surm_jax.peft.parts.layers import detach
from tests.peft.cases import UPDATES, fresh, trained
from tests.peft.models import CONFIG, MLP, MODELS, TENSORS, base, by_path, inputs, materialize, perturb, same_bits

FRESH_PROCESS = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
import numpy as np
from surm_jax import load_adapter
from tests.peft.models import base, inputs
np.save(sys.argv[2], load_adapter(sys.argv[1], base("mlp"))[0](inputs("mlp")))
"""


@pytest.fixture
def saved(tmp_path):
    """Return the folder of a saved circulant adapter for the model "mlp"."""
    save_adapter(tmp_path / "adapter", *trained("mlp", "circulant"))
    return tmp_path / "adapter"


def edit_config(folder, change):
    """Change the JSON file of a folder by the function `change`, and correct its SHA-256 unless `change` sets it."""
    config = json.loads((folder / CONFIG).read_text())
    before = config["sha256"]
    change(config)
    if config.get("sha256") == before:
        rest = {key: value for key, value in config.items() if key != "sha256"}
        payload = (folder / TENSORS).read_bytes() + json.dumps(rest, sort_keys=True).encode()
        config["sha256"] = hashlib.sha256(payload).hexdigest()
    (folder / CONFIG).write_text(json.dumps(config))


def edit_tensors(folder, change):
    """Change the tensor file of a folder in place and correct the SHA-256, so that the later checks are reached."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    (folder / TENSORS).write_bytes(save(tensors))
    edit_config(folder, lambda config: None)


class TestRoundTrip:
    @pytest.mark.exhaustive
    def test_a_fresh_process_computes_the_same_bits(self, saved, tmp_path):
        root = Path(__file__).resolve().parent.parent.parent
        subprocess.run(
            [sys.executable, "-c", FRESH_PROCESS, str(saved), str(tmp_path / "y.npy")],
            cwd=root,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            check=True,
        )
        assert same_bits(np.load(tmp_path / "y.npy"), trained("mlp", "circulant")[0](inputs("mlp")))

    def test_the_base_may_have_another_head(self, saved):
        other = materialize(MODELS["mlp"].make)
        other.head.kernel[...] = jnp.zeros_like(other.head.kernel[...])
        loaded, _ = load_adapter(saved, other)
        assert same_bits(loaded(inputs("mlp")), trained("mlp", "circulant")[0](inputs("mlp")))

    def test_a_loaded_adapter_trains_on_and_merges(self, saved):
        loaded, adapter = load_adapter(saved, base("mlp"))
        moved = perturb(loaded, adapter)
        assert not same_bits(moved(inputs("mlp")), loaded(inputs("mlp")))
        assert nnx.graphdef(merge(moved)[0]) == nnx.graphdef(base("mlp"))

    def test_several_rules_and_no_head(self, tmp_path):
        rules = [Rule("blocks/0", LoRA(rank=3)), Rule(".*", UPDATES["circulant"].method)]
        model, adapter = adapt(base("mlp"), rules, rngs=nnx.Rngs(1))
        model = perturb(model, adapter)
        save_adapter(tmp_path / "adapter", model, adapter)
        loaded, recipe = load_adapter(tmp_path / "adapter", base("mlp"))
        assert recipe == adapter
        assert {path: type(delta.stored()).__name__ for path, _, delta, _ in iter_parts(loaded)} == {
            "blocks/0": "LowRank", "blocks/1": "Circulant", "head": "Circulant", "tail/gate": "Circulant"
        }  # fmt: skip
        assert same_bits(loaded(inputs("mlp")), model(inputs("mlp")))

    def test_a_trained_kernel_of_an_adapted_layer_is_in_the_file(self, tmp_path):
        model, adapter = adapt(base("mlp"), [Rule("head", LoRA())], train=["head/.*"], rngs=nnx.Rngs(1))
        model = perturb(model, adapter)
        save_adapter(tmp_path / "adapter", model, adapter)
        assert load_file(tmp_path / "adapter" / TENSORS).keys() == {
            "head/bias", "head/kernel", "head/delta/down", "head/delta/up"
        }  # fmt: skip
        assert same_bits(load_adapter(tmp_path / "adapter", base("mlp"))[0](inputs("mlp")), model(inputs("mlp")))

    def test_tree_mode(self, tmp_path):
        with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
            original = materialize(MODELS["mlp"].make)
            rules = [Rule("blocks/0", UPDATES["circulant"].method)]
            model, adapter = adapt(original, rules, train=["head/.*"], rngs=nnx.Rngs(1))
            model = perturb(model, adapter)
            save_adapter(tmp_path / "adapter", model, adapter)
            loaded, _ = load_adapter(tmp_path / "adapter", original)
            assert same_bits(loaded(inputs("mlp")), model(inputs("mlp")))


class TestSaving:
    def test_an_adapter_that_is_there_is_replaced(self, saved):
        save_adapter(saved, *trained("mlp", "lora"))
        loaded, adapter = load_adapter(saved, base("mlp"))
        assert adapter == trained("mlp", "lora")[1]
        assert same_bits(loaded(inputs("mlp")), trained("mlp", "lora")[0](inputs("mlp")))
        assert [path.name for path in saved.parent.iterdir()] == [saved.name], "something was left behind"

    def test_parents_are_made_and_an_empty_folder_is_filled(self, tmp_path):
        (tmp_path / "a" / "b").mkdir(parents=True)
        for folder in (tmp_path / "a" / "b", tmp_path / "c" / "d"):
            save_adapter(folder, *fresh("mlp", "lora"))
            assert sorted(path.name for path in folder.iterdir()) == [CONFIG, TENSORS]
            assert stat.S_IMODE(folder.stat().st_mode) == 0o755

    def test_a_foreign_folder_is_left_alone(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))} exists and is not an adapter folder"):
            save_adapter(tmp_path, *fresh("mlp", "lora"))
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_a_file_in_its_place_is_left_alone(self, tmp_path):
        (tmp_path / "file").write_text("text")
        with pytest.raises(UserError, match="exists and is not an adapter folder"):
            save_adapter(tmp_path / "file", *fresh("mlp", "lora"))
        assert (tmp_path / "file").read_text() == "text"

    def test_a_place_that_cannot_be_written_is_named(self, tmp_path):
        (tmp_path / "file").write_text("text")
        with pytest.raises(UserError, match=r"^cannot write the adapter folder .*file/adapter: "):
            save_adapter(tmp_path / "file" / "adapter", *fresh("mlp", "lora"))

    @pytest.mark.parametrize("file", [CONFIG, TENSORS])
    def test_a_failure_on_the_way_keeps_the_old_adapter(self, saved, file, monkeypatch):
        before = {path.name: path.read_bytes() for path in saved.iterdir()}
        write = Path.write_bytes

        def full(path, data):
            if path.name == file:
                raise OSError(28, "No space left on device")
            return write(path, data)

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match="No space left on device"):
            save_adapter(saved, *trained("mlp", "lora"))
        assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
        assert [path.name for path in saved.parent.iterdir()] == [saved.name]

    def test_a_model_without_the_updates_is_refused(self, tmp_path):
        model, adapter = trained("mlp", "lora")
        with pytest.raises(UserError, match=r"^the model has no adapter 'default' \(known: none\)"):
            save_adapter(tmp_path / "adapter", merge(model)[0], adapter)
        part = nnx.clone(model)
        detach(part.tail.gate, "default")
        rules = (Rule(r"blocks/\d+", LoRA()), Rule("tail/gate", LoRA()))
        with pytest.raises(UserError, match=r"'tail/gate' matches no module with the adapter 'default'.*: blocks/0"):
            save_adapter(tmp_path / "adapter", part, dataclasses.replace(adapter, rules=rules))
        assert not (tmp_path / "adapter").exists()


class TestDamage:
    def test_a_folder_without_an_adapter(self, tmp_path):
        for folder in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(UserError, match=rf"^no adapter in {re.escape(str(folder))}: cannot read {CONFIG}"):
                load_adapter(folder, base("mlp"))

    def test_the_tensor_file_is_absent(self, saved):
        (saved / TENSORS).unlink()
        with pytest.raises(UserError, match=rf"^cannot read .*{TENSORS}: No such file"):
            load_adapter(saved, base("mlp"))

    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_a_truncated_tensor_file(self, saved, keep):
        (saved / TENSORS).write_bytes((saved / TENSORS).read_bytes()[:keep])
        with pytest.raises(UserError, match=rf"{TENSORS} or {CONFIG} is damaged or was changed"):
            load_adapter(saved, base("mlp"))

    @pytest.mark.parametrize("place", [0, 20, -1])
    def test_a_flipped_bit(self, saved, place):
        payload = bytearray((saved / TENSORS).read_bytes())
        payload[place] ^= 1
        (saved / TENSORS).write_bytes(payload)
        with pytest.raises(UserError, match=rf"{TENSORS} or {CONFIG} is damaged or was changed"):
            load_adapter(saved, base("mlp"))

    def test_what_is_no_tensor_file_behind_a_right_checksum(self, saved):
        (saved / TENSORS).write_bytes(b"text")
        edit_config(saved, lambda config: None)
        with pytest.raises(UserError, match=rf"{TENSORS} is damaged: "):
            load_adapter(saved, base("mlp"))

    def test_a_number_of_the_recipe_that_was_changed(self, saved):
        text, count = re.subn(r'"alpha": [\d.]+', '"alpha": 7.5', (saved / CONFIG).read_text())
        assert count == 1
        (saved / CONFIG).write_text(text)
        with pytest.raises(UserError, match=rf"{TENSORS} or {CONFIG} is damaged or was changed"):
            load_adapter(saved, base("mlp"))

    @pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe\x00", b'{"format": 1', b"[]", b"3", b"[" * 100_000])
    def test_what_is_no_json(self, saved, text):
        (saved / CONFIG).write_bytes(text)
        with pytest.raises(UserError, match=rf"{CONFIG} is damaged: "):
            load_adapter(saved, base("mlp"))

    @pytest.mark.parametrize("text", [b"{}", b'{"peft_type": "LORA", "r": 8}'])
    def test_what_someone_else_wrote(self, saved, text):
        (saved / CONFIG).write_bytes(text)
        with pytest.raises(UserError, match=rf"{CONFIG} was not written by surm_jax"):
            load_adapter(saved, base("mlp"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c.update(format=1), "has the adapter format 1, .* this version reads 3"),
            (lambda c: c.update(format=2), "has the adapter format 2, .* Train the adapter again"),
            (lambda c: c.pop("format"), "has the adapter format None"),
            (lambda c: c.pop("sha256"), "is damaged: it lacks 'sha256' or 'base'"),
            (lambda c: c.update(base=[]), "is damaged: it lacks 'sha256' or 'base'"),
            (lambda c: c.pop("rules"), f"{CONFIG}: not the recipe of an adapter"),
            (lambda c: c["rules"][0].pop("target"), f"{CONFIG}: not the recipe of an adapter"),
            (lambda c: c["rules"][0].update(method="circulent"), f"{CONFIG}: .*did you mean 'circulant'"),
            (lambda c: c["rules"][0]["settings"].update(scael=1.0), f"{CONFIG}: .*did you mean 'scale'"),
            (lambda c: c["rules"][0]["settings"].update(alpha="1"), f"{CONFIG}: .*alpha must be a number"),
            (lambda c: c["rules"][0].update(method="lora", settings={}), "lacks 'blocks/0/delta/down'"),
            (lambda c: c["rules"][0].update(target="blocks/0"), "holds 'blocks/1/delta/c'"),
            (lambda c: c["rules"][0].update(target="blocks/2"), "'blocks/2' matches no layer with a kernel"),
            (lambda c: c.update(train=["head/bias"]), "holds 'head/kernel', but the model has no such array"),
            (lambda c: c.update(train=["haed/.*"]), r"'haed/\.\*' matches no parameter"),
            (lambda c: c.update(sha256="0"), f"{TENSORS} or {CONFIG} is damaged or was changed"),
            (lambda c: c["base"].pop("blocks/0/bias"), "it also has blocks/0/bias"),
            (lambda c: c["rules"][0].update(target="((b|l|o|.)*)*x"), "matches no layer with a kernel|takes very long"),
            (lambda c: c["rules"][0].update(target="(" * 5000), f"{CONFIG}: .*is not a regular expression"),
            (lambda c: c.update(train=["(.*/)*x"]), "matches no parameter|takes very long"),
            (lambda c: c["rules"][0].update(parts=10**9, which=[0]), "10 output features cannot be divided into 10+ "),
            (lambda c: c["rules"][0]["settings"].update(alpha=10**400), f"{CONFIG}: circulant.alpha must be finite"),
            (
                lambda c: c["rules"][0].update(method="lora", settings={"rank": 10**9}),
                f"{CONFIG}: blocks/0 cannot be adapted: .* has a rank from 1 to 6, but 1000000000 was asked for",
            ),
            (
                lambda c: c["rules"][0].update(method="lora", settings={"rank": 10**30}),
                f"{CONFIG}: lora.rank must be finite and at most 1e\\+18",
            ),
            (
                lambda c: c["rules"][0].update(method="structured", settings={"family": "Dense+" * 999 + "Dense"}),
                f"{TENSORS} lacks 'blocks/0/delta/terms_0_W'",
            ),
        ],
    )  # fmt: skip
    def test_an_edited_recipe(self, saved, change, message):
        edit_config(saved, change)
        with pytest.raises(UserError, match=message):
            load_adapter(saved, base("mlp"))

    @pytest.mark.parametrize("name", [CONFIG, TENSORS])
    def test_what_never_ends(self, saved, name):
        (saved / name).unlink()
        (saved / name).symlink_to("/dev/zero")
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            load_adapter(saved, base("mlp"))

    def test_a_recipe_without_end(self, saved):
        (saved / CONFIG).write_bytes(b"{" + b" " * 2**23)
        with pytest.raises(UserError, match=r"has 8,388,609 bytes, but such a file may have at most"):
            load_adapter(saved, base("mlp"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop("blocks/1/delta/c"), "lacks 'blocks/1/delta/c'; did you mean '"),
            (lambda t: t.pop("head/bias"), "lacks 'head/bias'"),
            (lambda t: t.update(hat=np.ones(2, np.float32)), "holds 'hat', but the model has no such array"),
            (lambda t: t.update({"tail/norm/bias": np.ones(4, np.float32)}), "holds 'tail/norm/bias'"),
            (
                lambda t: t.update({"blocks/0/delta/c": np.ones(11, np.float32)}),
                r"blocks/0/delta/c has the shape \(11,\) in .*, but the model needs \(10,\)",
            ),
            (
                lambda t: t.update({"blocks/0/delta/c": np.full(10, np.nan, np.float32)}),
                "blocks/0/delta/c in .* holds numbers that are not finite",
            ),
            (lambda t: t.update({"head/bias": np.ones(3, np.int32)}), "head/bias in .* is of type I32, not of F64"),
        ],
    )
    def test_other_tensors(self, saved, change, message):
        edit_tensors(saved, change)
        with pytest.raises(UserError, match=message):
            load_adapter(saved, base("mlp"))


class TestOtherBase:
    def test_a_head_of_another_size(self, saved):
        with pytest.raises(UserError, match=r"^head/bias has the shape \(3,\) .* but the model needs \(7,\)"):
            load_adapter(saved, materialize(lambda: MLP(classes=7, rngs=nnx.Rngs(0))))

    @pytest.mark.parametrize("path", ["blocks/1/kernel", "tail/norm/scale"])
    def test_one_weight_in_its_last_bit(self, saved, path):
        other = materialize(MODELS["mlp"].make)
        state = nnx.state(other)
        variable = by_path(state)[path]
        array = np.array(variable[...])
        array.flat[0] = np.nextafter(array.flat[0], np.float32(9))
        variable[...] = jnp.asarray(array)
        nnx.update(other, state)
        with pytest.raises(UserError, match=rf"is not the one that the adapter .* values in {path}$"):
            load_adapter(saved, other)

    def test_another_dtype(self, saved):
        with pytest.raises(UserError, match=r"is not the one that .* other shapes or values in blocks/0/bias"):
            load_adapter(saved, base("bfloat16_kernels"))

    @pytest.mark.parametrize("name", ["attention", "vit"])
    def test_another_architecture(self, saved, name):
        with pytest.raises(UserError, match=r"the pattern 'blocks.*' matches no layer with a kernel"):
            load_adapter(saved, base(name))

    def test_a_model_with_one_more_layer(self, saved):
        class Deeper(MLP):
            def __init__(self, *, rngs):
                super().__init__(rngs=rngs)
                self.extra = nnx.Linear(2, 2, rngs=rngs)

        with pytest.raises(UserError, match="it also has extra/bias, extra/kernel"):
            load_adapter(saved, materialize(lambda: Deeper(rngs=nnx.Rngs(0))))

    def test_an_adapted_model(self, saved):
        with pytest.raises(UserError, match="the model has an adapter called 'default' already"):
            load_adapter(saved, trained("mlp", "lora")[0])


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_a_learned_alpha_comes_back(tmp_path, alpha):
    layer = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    model, adapter = adapt(layer, [Rule("", LoRA(learn_alpha=True, alpha=alpha))], rngs=nnx.Rngs(1))
    model = perturb(model, adapter)
    save_adapter(tmp_path / "a", model, adapter)
    loaded, _ = load_adapter(tmp_path / "a", layer)
    x = jnp.ones((2, 6))
    assert same_bits(loaded(x), model(x)) and not same_bits(loaded(x), layer(x))


def test_a_scale_is_not_lost_silently(tmp_path):
    layer = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    model, adapter = adapt(layer, [Rule("", LoRA())], rngs=nnx.Rngs(1))
    with pytest.raises(UserError, match=r"has the adapter 'default' at the scale 0\.5, which files do not hold"):
        save_adapter(tmp_path / "a", set_scale(model, "default", 0.5), adapter)
    assert not (tmp_path / "a").exists()
    for wrong in (float("nan"), None, "0.5"):
        with pytest.raises(UserError, match=f"must be a finite number, got {wrong!r}"):
            set_scale(model, "default", wrong)
