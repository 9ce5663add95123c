"""Check the files of adapter folders in peft's format, and what cannot be saved or loaded. peft is not needed."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx
from safetensors.numpy import load_file, save_file

from surm_jax.errors import UserError
from surm_jax.models import TARGETS, ViT, ViTConfig
from surm_jax.peft import (
    C3A,
    BottleneckBranch,
    CirculantUpdate,
    DoRA,
    GraLoRA,
    LoKr,
    LoRA,
    Rule,
    adapt,
    load_adapter,
    load_peft,
    save_adapter,
    save_peft,
)
from surm_jax.structured import Toeplitz
from tests.peft.hf.hf_model import CONFIG, MODULES, NAMES, TENSORS, dense, foreign, lora, make, normal, saved, trained
from tests.peft.models import materialize, parameters, perturb, same_bits


class TestWriting:
    def test_lora(self, tmp_path):
        model, settings, tensors = saved(tmp_path / "a", (r"blocks/\d/query", LoRA(rank=2, alpha=0.3)))
        expected = {}
        for i in range(2):
            arrays = {name: parameters(model)[f"blocks/{i}/query/delta/default/{name}"] for name in ("down", "up")}
            expected[f"base_model.model.net.layers.{i}.query_proj.lora_A.weight"] = arrays["down"].T
            expected[f"base_model.model.net.layers.{i}.query_proj.lora_B.weight"] = arrays["up"].T
        assert tensors.keys() == expected.keys()
        assert all(same_bits(tensors[name], array) for name, array in expected.items())
        assert settings == {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": None,
            "inference_mode": True,
            "target_modules": [
                "net.layers.0.query_proj", "net.layers.1.query_proj", "net.encoder.0.query", "net.encoder.1.query"
            ],
            "modules_to_save": None,
            "r": 2,
            "rank_pattern": {},
            "lora_alpha": 0.3,
            "alpha_pattern": {},
            "bias": "none",
        }  # fmt: skip

    def test_learned_alphas(self, tmp_path):
        model, settings, _ = saved(tmp_path / "a", (r"blocks/\d/up", LoRA(rank=2, learn_alpha=True)))
        alphas = [float(model.blocks[i].up.delta["default"].alpha[...]) for i in range(2)]
        assert alphas[0] != alphas[1]
        assert settings["lora_alpha"] == pytest.approx(alphas[0])
        assert settings["alpha_pattern"] == {"net.layers.1.up_proj": pytest.approx(alphas[1])}
        read, _ = load_peft(tmp_path / "a", make(), NAMES, name="read")
        for path, change in dense(model).items():
            np.testing.assert_allclose(dense(read)[path], change, rtol=1e-5)

    def test_layers_that_differ_are_exceptions_by_name(self, tmp_path):
        rules = [("blocks/0/up", LoRA(rank=3, alpha=6.0)), (r"blocks/\d/(up|query)", LoRA(rank=2, alpha=4.0))]
        _, settings, _ = saved(tmp_path / "a", *rules)
        assert (settings["r"], settings["lora_alpha"]) == (2, 4)
        assert settings["rank_pattern"] == {"net.layers.0.up_proj": 3}
        assert settings["alpha_pattern"] == {"net.layers.0.up_proj": 6}
        _, settings, _ = saved(tmp_path / "b", ("blocks/0/up", C3A(block=3)), (r"blocks/\d/query", C3A(block=2)))
        assert (settings["block_size"], settings["block_size_pattern"]) == (2, {"net.layers.0.up_proj": 3})

    @pytest.mark.parametrize(
        ("target", "update"), [("blocks/0/up", C3A(alpha=0.7, block=3)), ("blocks/0/query", CirculantUpdate(alpha=0.7))]
    )
    def test_c3a(self, target, update, tmp_path):
        """Compare with peft, which adds `y[q b + i] = sum_{p, a} x[p b + a] w[q, p, (a - i) mod b] / in`."""
        model, settings, tensors = saved(tmp_path / "a", (target, update))
        ((name, w),) = tensors.items()
        assert name == f"base_model.model.{MODULES[target][1]}.c3a_kernel"
        assert settings["block_size"] == w.shape[-1]
        # In scipy, circulant(c)[a, i] is c[(a - i) mod b].
        expected = (
            np.block([[scipy.linalg.circulant(w[q, p]) for q in range(w.shape[0])] for p in range(w.shape[1])]) / 6
        )
        np.testing.assert_allclose(dense(model)[target], expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("rank", "shapes"),
        [
            (2, {"lokr_w1": (3, 2), "lokr_w2": (3, 3)}),
            (1, {"lokr_w1": (3, 2), "lokr_w2_a": (3, 1), "lokr_w2_b": (1, 3)}),
        ],
    )
    def test_lokr(self, rank, shapes, tmp_path):
        """Compare with peft, which adds `alpha / r * kron(w1, w2)` to a weight of shape (out, in).

        peft's function `factorization` splits in_features = 6 into 2 x 3, and out_features = 9 into 3 x 3.
        """
        update = LoKr(rank=rank, alpha=0.7)
        model, settings, tensors = saved(tmp_path / "a", ("blocks/0/up", update))
        tensors = {
            name.removeprefix("base_model.model.net.layers.0.up_proj."): array for name, array in tensors.items()
        }
        assert {name: array.shape for name, array in tensors.items()} == shapes
        w2 = tensors["lokr_w2"] if rank == 2 else tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
        expected = settings["alpha"] / settings["r"] * np.kron(tensors["lokr_w1"], w2).T
        np.testing.assert_allclose(dense(model)["blocks/0/up"], expected, rtol=1e-5, atol=1e-6)
        assert (settings["r"], settings["alpha"], settings["decompose_factor"]) == (rank, 0.7, -1)
        read, adapter = load_peft(tmp_path / "a", make(), NAMES)
        assert adapter.rules == (Rule("blocks/0/up", update),)
        assert all(same_bits(array, parameters(model)[path]) for path, array in parameters(read).items())

    def test_layers_of_lokr_share_a_factorization(self, tmp_path):
        rules = [(f"blocks/{i}/query", LoKr(rank=4, divisor=factor)) for i, factor in enumerate((2, 3))]
        _, settings, tensors = saved(tmp_path / "a", *rules[1:])
        assert settings["decompose_factor"] == 3
        assert tensors["base_model.model.net.layers.1.query_proj.lokr_w1"].shape == (3, 3)
        with pytest.raises(UserError, match=r"^no decompose_factor of peft's LoKr .* blocks/0/query .* method lokr"):
            saved(tmp_path / "b", *rules)

    def test_what_else_is_trained_is_whole_modules(self, tmp_path):
        train = ["head/kernel", "blocks/1/norm/.*", "embed/embedding", "conv/bias"]
        model, settings, tensors = saved(tmp_path / "a", ("blocks/0/up", LoRA()), train=train)
        ours = parameters(model)
        expected = {
            "classifier.weight": ours["head/kernel"].T,
            "classifier.bias": ours["head/bias"],
            "net.layers.1.norm_proj.weight": ours["blocks/1/norm/scale"],
            "net.layers.1.norm_proj.bias": ours["blocks/1/norm/bias"],
            "net.embed.weight": ours["embed/embedding"],
            "net.conv.weight": ours["conv/kernel"].transpose(3, 2, 0, 1),
            "net.conv.bias": ours["conv/bias"],
        }
        found = {name.removeprefix("base_model.model."): array for name, array in tensors.items() if "lora" not in name}
        assert found.keys() == expected.keys()
        assert all(same_bits(found[name], array) for name, array in expected.items())
        assert sorted(settings["modules_to_save"]) == sorted({name.rpartition(".")[0] for name in expected})

        read, adapter = load_peft(tmp_path / "a", make(), NAMES)
        assert all(same_bits(array, ours[path]) for path, array in parameters(read).items())
        assert sorted(adapter.train) == ["blocks/1/norm/.*", "conv/.*", "embed/.*", "head/.*"]

    @pytest.mark.parametrize(
        ("rules", "train", "message"),
        [
            ([], ["head/.*"], "^the adapter 'default' has no update"),
            ([("nameless", LoRA())], [], "^nameless has no name in transformers.* merge"),
            (
                [("blocks/0/up", CirculantUpdate())],
                [],
                "^the part of blocks/0/up is a CirculantPair of 6 x 9, .* merge",
            ),
            ([("blocks/0/up", LoRA()), ("blocks/1/up", C3A())], [], r"LORA \(blocks/0/up\) and C3A \(blocks/1/up\)"),
            (
                [("blocks/0/up", GraLoRA(rank=3, blocks=3)), ("blocks/1/up", GraLoRA(rank=3, blocks=1))],
                [],
                "^peft's GraLoRA has one rank .* blocks/0/up has rank 3 in 3 blocks, and blocks/1/up rank 3 in 1",
            ),
            ([("blocks/0/up", DoRA())], [], r"^the part of blocks/0/up has learned magnitudes \(DoRA\)"),
            (
                [("blocks/0/up", BottleneckBranch())],
                [],
                "^the part of blocks/0/up is added to the output",
            ),
            (
                [("blocks/0/up", LoRA())],
                ["blocks/0/up/bias"],
                "^blocks/0/up/bias is trained in a layer that also has an up",
            ),
            ([("blocks/0/up", LoRA())], ["head/.*", "token"], "^token is trained, but peft trains whole modules"),
            ([("blocks/0/up", LoRA())], ["nameless/bias"], "^nameless/bias is trained, but peft trains whole modules"),
            ([("blocks/0/up", LoRA())], ["outer/bias"], "^outer/bias is trained, but peft trains whole modules"),
        ],
    )
    def test_what_peft_cannot_hold(self, rules, train, message, tmp_path):
        model, adapter = trained(*rules, train=train)
        with pytest.raises(UserError, match=message):
            save_peft(tmp_path / "a", model, adapter, NAMES)
        assert not (tmp_path / "a").exists()

    def test_a_family_without_a_format(self, tmp_path, monkeypatch):
        model, adapter = trained(("blocks/0/query", CirculantUpdate()))
        delta = model.blocks[0].query.delta["default"]
        monkeypatch.setattr(type(delta), "stored", lambda self: Toeplitz(jnp.ones(11), (6, 6)))
        with pytest.raises(UserError, match=r"^the part of blocks/0/query is a Toeplitz of 6 x 6, .*--mode=merge"):
            save_peft(tmp_path / "a", model, adapter, NAMES)

    def test_folders(self, tmp_path):
        model, adapter = trained(("blocks/0/up", LoRA()))
        for _ in range(2):
            save_peft(tmp_path / "deep" / "a", model, adapter, NAMES, base_model="some/model")
        assert json.loads((tmp_path / "deep" / "a" / CONFIG).read_text())["base_model_name_or_path"] == "some/model"
        (tmp_path / "deep" / "a" / "optimizer.pt").write_text("years of work")
        with pytest.raises(UserError, match=r"also holds optimizer.pt"):
            save_peft(tmp_path / "deep" / "a", model, adapter, NAMES)
        with pytest.raises(UserError, match="is not an adapter folder"):
            save_peft(tmp_path / "deep", model, adapter, NAMES)
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a"], "something was left behind"


class TestReading:
    @pytest.mark.parametrize("rslora", [False, True])
    @pytest.mark.parametrize("module", MODULES["blocks/0/up"][1:])
    def test_lora(self, rslora, module, tmp_path):
        folder, A, B = lora(tmp_path / "a", modules=[module], use_rslora=rslora)
        base = make()
        before = parameters(base)
        model, adapter = load_peft(folder, base, NAMES, execution="dense")
        np.testing.assert_allclose(dense(model)["blocks/0/up"], 3 / (2**0.5 if rslora else 2) * (B @ A).T, rtol=1e-5)
        assert [rule.target for rule in adapter.rules] == ["blocks/0/up"]
        assert model.blocks[0].up.delta["default"].execution == "dense"
        assert parameters(base).keys() == before.keys()
        adapt(base, adapter.rules, train=adapter.train, rngs=nnx.Rngs(0))

    @pytest.mark.parametrize(
        ("patterns", "factor"),
        [
            ({}, 3 / 2),
            ({"up_proj": 5}, 5 / 2),
            ({"net.layers.0.up_proj": 5}, 5 / 2),
            ({"^net.layers.0.up_proj": 5}, 5 / 2),
            ({r"layers\.\d+\.up_proj": 5, "up_proj": 7}, 5 / 2),
            ({"(down|up)_proj": 5.5}, 5.5 / 2),
            ({"p_proj": 5, "layers": 5, "net": 5}, 3 / 2),
        ],
    )
    def test_exceptions_by_name(self, patterns, factor, tmp_path):
        folder, A, B = lora(tmp_path / "a", alpha_pattern=patterns)
        model, _ = load_peft(folder, make(), NAMES)
        np.testing.assert_allclose(dense(model)["blocks/0/up"], factor * (B @ A).T, rtol=1e-5)

    def test_lokr_with_both_factors_decomposed(self, tmp_path):
        parts = {"w1_a": (3, 1), "w1_b": (1, 2), "w2_a": (3, 1), "w2_b": (1, 3)}
        arrays = {name: normal(*shape, seed=seed) for seed, (name, shape) in enumerate(parts.items())}
        settings = {"peft_type": "LOKR", "r": 1, "alpha": 3, "decompose_both": True, "target_modules": ["0.up_proj"]}
        tensors = {f"net.layers.0.up_proj.lokr_{name}": array for name, array in arrays.items()}
        model, _ = load_peft(foreign(tmp_path / "a", settings, tensors), make(), NAMES)
        expected = 3 * np.kron(arrays["w1_a"] @ arrays["w1_b"], arrays["w2_a"] @ arrays["w2_b"]).T
        np.testing.assert_allclose(dense(model)["blocks/0/up"], expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("factor", [0, -2, 2.0, True, "2"])
    def test_a_factorization_that_is_none(self, factor, tmp_path):
        folder = foreign(tmp_path / "a", {"peft_type": "LOKR", "decompose_factor": factor},
                         {"net.layers.0.up_proj.lokr_w1": normal(3, 2)})  # fmt: skip
        with pytest.raises(UserError, match=r"sets decompose_factor = .*, which must be -1 or a whole number"):
            load_peft(folder, make(), NAMES)

    def test_defaults_of_peft(self, tmp_path):
        folder, A, B = lora(tmp_path / "a", rank=6, target_modules=None, rank_pattern={"up_proj": 6})
        settings = json.loads((folder / CONFIG).read_text())
        del settings["lora_alpha"], settings["r"], settings["target_modules"]
        (folder / CONFIG).write_text(json.dumps(settings))
        np.testing.assert_allclose(
            dense(load_peft(folder, make(), NAMES)[0])["blocks/0/up"], 8 / 6 * (B @ A).T, rtol=1e-5
        )

    def test_halves_are_read_as_float32(self, tmp_path):
        folder, _, _ = lora(tmp_path / "a")
        for dtype in (np.float16, jnp.bfloat16, np.float64):
            tensors = {name: array.astype(dtype) for name, array in load_file(folder / TENSORS).items()}
            save_file(tensors, folder / TENSORS)
            model, _ = load_peft(folder, make(), NAMES)
            up = model.blocks[0].up.delta["default"].up[...]
            assert up.dtype == jnp.float32
            assert same_bits(up.T, tensors["base_model.model.net.layers.0.up_proj.lora_B.weight"].astype(np.float32))

    @pytest.mark.parametrize(("module", "path", "shape"), [("net.layers.0.up_proj", "blocks/0/up", (6, 9)),
                                                           ("classifier", "head", (6, 4))])  # fmt: skip
    @pytest.mark.parametrize("stabilized", [False, True])
    def test_a_rank_above_the_size_of_the_layer(self, module, path, shape, stabilized, tmp_path):
        folder, A, B = lora(tmp_path / "a", rank=10, modules=[module], shape=shape, use_rslora=stabilized)
        model, adapter = load_peft(folder, make(), NAMES)
        expected = 3 / (np.sqrt(10) if stabilized else 10) * (B.astype(np.float64) @ A).T
        np.testing.assert_allclose(dense(model)[path], expected, rtol=1e-5, atol=1e-5)
        save_adapter(tmp_path / "ours", model, adapter)
        assert same_bits(dense(load_adapter(tmp_path / "ours", make())[0])[path], dense(model)[path])

    def test_rules_are_as_general_as_the_layers_allow(self, tmp_path):
        names = [f"net.layers.{i}.query_proj" for i in range(2)]
        folder, _, _ = lora(tmp_path / "a", modules=names, shape=(6, 6), alpha_pattern={})
        assert [rule.target for rule in load_peft(folder, make(), NAMES)[1].rules] == [r"blocks/\d+/query"]
        folder, _, _ = lora(tmp_path / "b", modules=names, shape=(6, 6), alpha_pattern={names[1]: 9})
        rules = load_peft(folder, make(), NAMES)[1].rules
        assert rules == (Rule("blocks/0/query", LoRA(rank=2, alpha=3)), Rule("blocks/1/query", LoRA(rank=2, alpha=9)))

    def test_a_model_of_ours_from_end_to_end(self, tmp_path):
        """Save and load with the names of the ViT of transformers, which has two sets of names for its blocks."""
        from surm_jax.pretrained.hf import Names, architecture_of

        config = ViTConfig(image_size=8, patch_size=4, width=12, depth=2, heads=3, mlp_width=20, num_classes=7)
        names = Names(architecture_of(config), config)
        base = materialize(lambda: ViT(config, rngs=nnx.Rngs(0)))
        model, adapter = adapt(base, [Rule(TARGETS["qv"], LoRA(rank=3))], train=["head/.*"], rngs=nnx.Rngs(1))
        model = perturb(model, adapter)
        save_peft(tmp_path / "a", model, adapter, names)
        read, recipe = load_peft(tmp_path / "a", base, names)
        assert all(same_bits(array, parameters(model)[path]) for path, array in parameters(read).items())
        assert {rule.method for rule in recipe.rules} == {rule.method for rule in adapter.rules}
        tensors = load_file(tmp_path / "a" / TENSORS)
        assert "base_model.model.vit.layers.1.attention.q_proj.lora_A.weight" in tensors

        def earlier(name):
            name = re.sub(r"vit\.layers\.(\d)\.attention", r"vit.encoder.layer.\1.attention.attention", name)
            return name.replace("q_proj", "query").replace("v_proj", "value")

        save_file({earlier(name): array for name, array in tensors.items()}, tmp_path / "a" / TENSORS)
        again, _ = load_peft(tmp_path / "a", base, names)
        assert all(same_bits(array, parameters(model)[path]) for path, array in parameters(again).items())
