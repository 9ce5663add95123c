"""Check that damaged or hostile adapter folders in the format of Hugging Face's peft are refused."""

import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from surm_jax.errors import UserError
from surm_jax.peft import LoRA, load_peft, save_adapter
from tests.peft.hf.hf_model import CONFIG, NAMES, TENSORS, dense, foreign, lora, make, normal, trained


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "VERA"}, r"sets peft_type = 'VERA', .* C3A, GRALORA, LOKR, LORA"),
        ({"peft_type": "LORRA"}, "did you mean 'LORA'"),
        ({"peft_type": None}, "sets peft_type = None"),
        ({"peft_type": ["LORA"]}, "sets peft_type = "),
        ({"use_dora": True}, "sets use_dora = True, which has no counterpart here"),
        ({"bias": "all"}, "sets bias = 'all', which has no counterpart here"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "sets layer_replication = .*no counterpart"),
        ({"fan_in_fan_out": True}, "sets fan_in_fan_out = True"),
        ({"lora_bias": True}, "sets lora_bias = True"),
        ({"target_parameters": ["a.b"]}, r"sets target_parameters = \['a.b'\]"),
        ({"trainable_token_indices": [1]}, "sets trainable_token_indices"),
        ({"a_setting_of_next_year": {"x": 1}}, "sets a_setting_of_next_year"),
        ({"init_lora_weights": "pissa"}, "sets init_lora_weights = 'pissa', .*save_pretrained"),
        ({"init_lora_weights": ["pissa"]}, r"sets init_lora_weights = \['pissa'\]"),
        ({"use_rslora": 1}, "sets use_rslora = 1, which must be true or false"),
        ({"r": 2.0}, r"sets r = 2.0, which must be a whole number of at least 1"),
        ({"r": -1}, "sets r = -1, which must be a whole"),
        ({"r": True}, "sets r = True, which must be a whole"),
        ({"r": 10**12}, r"lora_A.weight has the shape \(2, 6\) in .* needs \(1000000000000, 6\)"),
        ({"r": 10**400}, "sets r = 1000.*, which must be a whole"),
        ({"lora_alpha": float("nan")}, "sets lora_alpha = nan, which must be a number"),
        ({"lora_alpha": "8"}, "sets lora_alpha = '8', which must be a number"),
        ({"lora_alpha": 0}, "sets lora_alpha = 0, which must be a number other than 0"),
        ({"alpha_pattern": {"up_proj": None}}, r"sets alpha_pattern\['up_proj'\] = None"),
        ({"alpha_pattern": ["up_proj"]}, "sets alpha_pattern = .*must map names"),
        ({"alpha_pattern": {"(": 1}}, r"pattern '\(' is not a regular expression"),
        ({"rank_pattern": {"(" * 5000: 1}}, "is not a regular expression"),
        ({"target_modules": "(up_proj"}, "is not a regular expression"),
        ({"target_modules": ["query_proj", "up_proj"]}, "has no update of blocks/0/query, although target_modules"),
        (
            {"target_modules": r".*\.\d\.(up|query)_proj"},
            "has no update of blocks/0/query, although target_modules",
        ),
        ({"target_modules": 3}, "sets target_modules = 3, which must be a list of module names"),
        ({"modules_to_save": ["classifier"]}, r"lacks base_model.model.classifier.\*, although modules_to_save"),
        ({"modules_to_save": "head"}, "sets modules_to_save = 'head', which must be a list"),
    ],
)
def test_settings(settings, message, tmp_path):
    folder, _, _ = lora(tmp_path / "a", **settings)
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}.*{message}|^base_model.*{message}"):
        load_peft(folder, make(), NAMES)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["query_proj", "up_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["query_proj", "up_proj"], "exclude_modules": ["query_proj"]},
        {"target_modules": r"(((.*)*)*)*layers\.0\.up_proj"},
        {"modules_to_save": ["score"], "lora_dropout": 0.1, "init_lora_weights": "gaussian", "loftq_config": {}},
        {"megatron_core": "megatron.core", "peft_version": "1.0", "base_model_name_or_path": "/etc"},
    ],
)  # fmt: skip
def test_settings_that_say_nothing_of_the_result(settings, tmp_path):
    folder, A, B = lora(tmp_path / "a", **settings)
    np.testing.assert_allclose(dense(load_peft(folder, make(), NAMES)[0])["blocks/0/up"], 1.5 * (B @ A).T, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("net.layers.0.up_proj.lora_B.weight"), "lacks 'base_model.model.net.*lora_B.weight"),
        (lambda t: t.update({"net.layers.0.up_proj.lora_B.bias": normal(9)}), "lora_B.bias', which has no"),
        (lambda t: t.update({"net.layers.0.up_proj.lora_magnitude_vector": normal(9)}), "which has no counterpart"),
        (lambda t: t.update({"net.layers.0.up_proj.weight": normal(9, 6)}), "which has no counterpart"),
        (lambda t: t.update({"net.embed.lora_embedding_A": normal(2, 5)}), r"net.embed \(embed here\) is"),
        (lambda t: t.update({"net.conv.lora_A.weight": normal(2, 2, 3, 3)}), r"net.conv .*no .* it is Conv"),
        (lambda t: t.update({"net.layers.9.up_proj.lora_A.weight": normal(2, 6)}), "no module 'net.layers.9"),
        (lambda t: t.update({"classifier.weight": normal(4, 6)}), "lacks 'base_model.model.classifier.bias'"),
        (lambda t: t.update({"classifier.bias": normal(5)}), r"\(5,\) .* needs \(4,\)"),
        (lambda t: t.update({"net.layers.0.up_proj.lora_A.weight": normal(3, 6)}), r"\(3, 6\) .* needs \(2, 6\)"),
        (lambda t: t.update({"net.layers.0.up_proj.lora_A.weight": np.ones((2, 6), np.int32)}), "is of type I32"),
        (
            lambda t: t.update({"net.layers.0.up_proj.lora_A.weight": np.full((2, 6), np.inf, np.float32)}),
            "lora_A.weight in .* holds numbers that are not finite",
        ),
        (lambda t: t.clear(), "has no update of blocks/0/up, although target_modules names"),
    ],
)  # fmt: skip
def test_tensors(change, message, tmp_path):
    A, B = normal(2, 6), normal(9, 2)
    tensors = {"net.layers.0.up_proj.lora_A.weight": A, "net.layers.0.up_proj.lora_B.weight": B}
    change(tensors)
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["0.up_proj"]}
    with pytest.raises(UserError, match=message):
        load_peft(foreign(tmp_path / "a", settings, tensors), make(), NAMES)


def test_no_tensors_and_foreign_tensors(tmp_path):
    with pytest.raises(UserError, match="holds no update of a linear layer"):
        load_peft(foreign(tmp_path / "a", {"peft_type": "LORA"}, {}), make(), NAMES)
    folder, _, _ = lora(tmp_path / "b")
    save_file({**load_file(folder / TENSORS), "lora_unet_x": normal(2)}, folder / TENSORS)
    with pytest.raises(UserError, match=r"holds 'lora_unet_x', but the names of peft's tensors begin with base_model"):
        load_peft(folder, make(), NAMES)


def test_more_than_we_can_hold(tmp_path):
    settings = {"peft_type": "C3A", "block_size": 4, "target_modules": ["up_proj"]}
    folder = foreign(tmp_path / "b", settings, {"net.layers.0.up_proj.c3a_kernel": normal(2, 1, 4)})
    with pytest.raises(UserError, match=r"sets blocks of 4 for net.layers.0.up_proj, .* 6 x 9"):
        load_peft(folder, make(), NAMES)


def test_files(tmp_path):
    with pytest.raises(UserError, match=rf"^no adapter in .*: cannot read {CONFIG}"):
        load_peft(tmp_path, make(), NAMES)
    folder, _, _ = lora(tmp_path / "a")
    good = (folder / TENSORS).read_bytes()
    for payload in (b"", good[:100], good[:-1], good + b"x", b"\xff" * 8 + good[8:], b"PK\x03\x04"):
        (folder / TENSORS).write_bytes(payload)
        with pytest.raises(UserError, match=rf"{TENSORS} is damaged"):
            load_peft(folder, make(), NAMES)
    (folder / TENSORS).unlink()
    with pytest.raises(UserError, match=rf"^cannot read .*{TENSORS}"):
        load_peft(folder, make(), NAMES)
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(UserError, match=r"adapter_model.bin, a pickle, .* is not read"):
        load_peft(folder, make(), NAMES)
    for text in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"r": ' + b"9" * 5000 + b"}"):
        (folder / CONFIG).write_bytes(text)
        with pytest.raises(UserError, match=rf"{CONFIG} is damaged"):
            load_peft(folder, make(), NAMES)
    (folder / CONFIG).write_bytes(b'{"peft_type": "LORA"' + b" " * 2**20 + b"}")
    with pytest.raises(UserError, match=r"has 1,048,597 bytes, but such a file may have at most"):
        load_peft(folder, make(), NAMES)


def test_a_folder_of_ours_and_an_adapted_model(tmp_path):
    model, adapter = trained(("blocks/0/up", LoRA()))
    save_adapter(tmp_path / "ours", model, adapter)
    with pytest.raises(UserError, match="sets peft_type = None"):
        load_peft(tmp_path / "ours", make(), NAMES)
    folder, _, _ = lora(tmp_path / "theirs")
    with pytest.raises(UserError, match="has an adapter called 'default' already"):
        load_peft(folder, model, NAMES)
