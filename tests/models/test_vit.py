"""Tests of `ViT` and its configuration.

Further tests, which compare `ViT` with models in PyTorch, are in `test_vit_peers.py`.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import surm_jax
from surm_jax.errors import UserError
from surm_jax.models import REMAT, TARGETS, ViT, ViTConfig
from tests.speeds import fast

# The number of parameters of each variant with 1,000 classes. For the published models, the numbers are those of
# MODEL_SIZES in models_test.py of google-research/vision_transformer.
SIZES = {
    "Ti/16": 5_717_416,
    "S/16": 22_050_664,
    "B/16": 86_567_656,
    "B/32": 88_224_232,
    "L/16": 304_326_632,
    "mini": 2_884_648,
    "digits": 266_408,
}

QKV = ("query", "key", "value")
TINY = {"image_size": 8, "patch_size": 4, "width": 12, "depth": 2, "heads": 3, "mlp_width": 20, "num_classes": 5}


def tiny(**overrides):
    """Return a tiny ViT with random parameters.

    NumPy draws the parameters, because compiling the initialisers would take longer than all tests in this file.
    """
    config = ViTConfig(**{**TINY, **overrides})
    graphdef, state = nnx.split(abstract(config))
    rng = np.random.default_rng(0)
    values = [
        (path, v.copy(jnp.asarray(0.5 * rng.standard_normal(v.shape), v.dtype))) for path, v in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(values))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, images_bhwc, key):
    return nnx.merge(graphdef, state)(images_bhwc, rngs=key)


def logits(model, images_bhwc, key=None):
    """Return the output of the model, computed under `jax.jit`."""
    return _logits(*nnx.split(model), images_bhwc, key)


def images(batch=2, size=8, channels=3):
    return jnp.asarray(np.random.default_rng(1).standard_normal((batch, size, size, channels)), jnp.float32)


def abstract(config):
    return nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))


def compiled(module, function):
    graphdef, state = nnx.split(module)
    return jax.jit(lambda state: function(nnx.merge(graphdef, state)))(state)


def parameter_paths(model):
    return parameter_paths_of(nnx.state(model))


def parameter_paths_of(state):
    return {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


class TestGeometry:
    def test_every_size_has_every_patch(self):
        expected = {f"{size}/{patch}" for size, patch in itertools.product(("Ti", "S", "B", "L"), (8, 14, 16, 32))}
        assert ViTConfig.VARIANTS.keys() == expected | {"mini", "digits"}
        for name in expected:
            size, patch = name.split("/")
            config = ViTConfig.from_variant(name, num_classes=1000)
            assert (config.image_size, config.patch_size) == (224, int(patch))
            assert dataclasses.replace(config, patch_size=16) == ViTConfig.from_variant(f"{size}/16", num_classes=1000)

    @pytest.mark.parametrize("variant", fast(SIZES))
    def test_golden_size(self, variant):
        model = abstract(ViTConfig.from_variant(variant, num_classes=1000))
        assert sum(variable.size for variable in parameter_paths(model).values()) == SIZES[variant]

    def test_parameter_paths(self):
        layers = ["patch_embed/kernel", "patch_embed/bias", "cls_token", "position_embed"]
        layers += ["norm/scale", "norm/bias", "head/kernel", "head/bias"]
        for i in range(2):
            layers += [f"blocks/{i}/{norm}/{leaf}" for norm in ("norm1", "norm2") for leaf in ("scale", "bias")]
            linears = [f"attention/{name}" for name in ("query", "key", "value", "out")] + ["mlp/up", "mlp/down"]
            layers += [f"blocks/{i}/{linear}/{leaf}" for linear in linears for leaf in ("kernel", "bias")]
        found = parameter_paths(abstract(ViTConfig(**TINY)))
        assert found.keys() == set(layers)
        assert {variable.dtype for variable in found.values()} == {jnp.dtype("float32")}
        assert found["blocks/1/attention/query/kernel"].shape == (12, 3, 4)
        assert found["blocks/1/attention/out/kernel"].shape == (3, 4, 12)
        assert found["position_embed"].shape == (1, 5, 12)

    def test_mean_pooling_has_no_class_token(self):
        found = parameter_paths(abstract(ViTConfig(**TINY, pool="mean")))
        assert "cls_token" not in found
        assert found["position_embed"].shape == (1, 4, 12)

    @pytest.mark.parametrize(
        ("overrides", "added", "removed"),
        [
            ({"pool": "patches"}, {}, set()),
            ({"pool": "token+patches"}, {"head/kernel": (24, 5)}, set()),
            ({"qkv_bias": False}, {}, {f"blocks/{i}/attention/{name}/bias" for i in (0, 1) for name in QKV}),
            ({"patch_bias": False}, {}, {"patch_embed/bias"}),
            ({"pre_norm": True}, {"pre_norm/scale": (12,), "pre_norm/bias": (12,)}, set()),
            ({"final_norm": False}, {}, {"norm/scale", "norm/bias"}),
            ({"layer_scale": True}, {f"blocks/{i}/scale{j}": (12,) for i in (0, 1) for j in (1, 2)}, set()),
            ({"distillation": True}, {"distillation_token": (1, 1, 12), "position_embed": (1, 6, 12)}, set()),
            ({"head_bias": False}, {}, {"head/bias"}),
        ],
    )  # fmt: skip
    def test_parts_that_come_and_go(self, overrides, added, removed):
        plain = {path: variable.shape for path, variable in parameter_paths(abstract(ViTConfig(**TINY))).items()}
        found = {path: v.shape for path, v in parameter_paths(abstract(ViTConfig(**TINY, **overrides))).items()}
        assert removed <= plain.keys()
        assert found == {path: shape for path, shape in (plain | added).items() if path not in removed}

    def test_dtype_of_parameters(self):
        config = ViTConfig(**TINY, param_dtype="bfloat16", distillation=True, pre_norm=True, layer_scale=True)
        for path, variable in parameter_paths(abstract(config)).items():
            small = re.fullmatch(r"(.*/)?(pre_)?norm\d?/.*|head/.*|.*/scale\d", path)
            assert variable.dtype == ("float32" if small else "bfloat16"), path

    @pytest.mark.parametrize(
        ("name", "per_block"), [("qkv", 3), ("qv", 2), ("attention", 4), ("mlp", 2), ("all-linear", 6)]
    )
    def test_targets_select_linear_layers_of_every_block(self, name, per_block):
        model = abstract(ViTConfig(**TINY))
        paths = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
        selected = [path for path in paths if re.fullmatch(TARGETS[name], path)]
        assert len(selected) == 2 * per_block
        assert all(isinstance(paths[path], nnx.Linear | nnx.LinearGeneral) for path in selected)

    @pytest.mark.parametrize(("name", "modules"), [("houlsby", ("attention", "mlp")), ("pfeiffer", ("mlp",))])
    def test_targets_select_the_branches_of_every_block(self, name, modules):
        paths = ["/".join(map(str, path)) for path, _ in nnx.iter_modules(abstract(ViTConfig(**TINY)))]
        selected = {path for path in paths if re.fullmatch(TARGETS[name], path)}
        assert selected == {f"blocks/{index}/{module}" for index in range(2) for module in modules}

    def test_every_target_preset_is_tested(self):
        assert TARGETS.keys() == {"qkv", "qv", "attention", "mlp", "all-linear", "houlsby", "pfeiffer"}


class TestConfig:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"heads": 5}, "5 heads for width 12"),
            ({"patch_size": 3}, "patches of 3 pixels for images of 8"),
            ({"depth": 0}, "depth must be a positive integer, got 0"),
            ({"width": 12.0}, "width must be a positive integer, got 12.0"),
            ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
            ({"pool": "tokens"}, "did you mean 'token'"),
            ({"activation": "gelu_tan"}, "did you mean 'gelu_tanh'"),
            ({"epsilon": 0.0}, "epsilon must be positive and finite, got 0.0"),
            ({"param_dtype": "float16"}, "ViTConfig.param_dtype must be one of"),
            ({"pool": "mean", "distillation": True}, "distillation needs a class token"),
            ({"dtype": "float16"}, "did you mean 'bfloat16' or 'float32'|did you mean 'bfloat16'"),
        ],
    )
    def test_mistakes(self, overrides, message):
        with pytest.raises(UserError, match=message):
            ViTConfig(**{**TINY, **overrides})

    def test_unknown_variant(self):
        with pytest.raises(UserError, match="did you mean 'digits'"):
            ViTConfig.from_variant("digit", num_classes=10)

    def test_unknown_field(self):
        with pytest.raises(UserError, match=r"no field 'pach_size'.*did you mean 'patch_size'"):
            ViTConfig.from_variant("mini", num_classes=10, pach_size=8)

    def test_overrides(self):
        config = ViTConfig.from_variant("digits", num_classes=3, image_size=16, pool="mean")
        assert (config.image_size, config.channels, config.num_classes, config.tokens) == (16, 1, 3, 64)


class TestForward:
    def test_wrong_image_size(self):
        with pytest.raises(UserError, match=r"\(batch, 8, 8, 3\), got \(2, 12, 12, 3\)"):
            tiny()(images(size=12))

    def test_images_do_not_see_each_other(self):
        batch = images()
        changed = batch.at[0].add(1.0)
        np.testing.assert_allclose(logits(tiny(), changed)[1], logits(tiny(), batch)[1], rtol=1e-6)
        assert jnp.abs(logits(tiny(), changed)[0] - logits(tiny(), batch)[0]).max() > 1e-3

    def test_hidden_states_end_in_the_logits(self):
        model = tiny(pre_norm=True, pool="token+patches")
        states = compiled(model, lambda model: model.hidden_states(images()))
        assert [state.shape for state in states] == [(2, 5, 12)] * 3
        for state, block, after in zip(states, model.blocks, states[1:], strict=False):
            np.testing.assert_allclose(compiled(block, lambda b, x=state: b(x, None)), after, rtol=1e-4, atol=1e-5)
        last = compiled(model.norm, lambda norm: norm(states[-1]))
        read = np.concatenate([last[:, 0], last[:, 1:].mean(1)], axis=1)
        expected = read @ np.asarray(model.head.kernel[...]) + np.asarray(model.head.bias[...])
        np.testing.assert_allclose(logits(model, images()), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("pool", fast(["token", "mean"]))
    def test_bfloat16_compute_is_near_float32(self, pool):
        exact = logits(tiny(pool=pool), images())
        model = tiny(pool=pool, dtype="bfloat16")
        rounded = logits(model, images())
        assert rounded.dtype == jnp.float32
        assert {variable.dtype for variable in parameter_paths(model).values()} == {jnp.dtype("float32")}
        error = jnp.abs(rounded - exact).max() / jnp.abs(exact).max()
        assert 1e-5 < error < 0.05  # The error has the size of rounding errors in bfloat16.

    @pytest.mark.exhaustive
    def test_projections_are_called_and_can_be_wrapped(self):
        class Doubled(nnx.Module):
            def __init__(self, base):
                self.base = base

            def __call__(self, x):
                return 2 * self.base(x)

        def apply_block(block, x):
            graphdef, state = nnx.split(block)
            return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x, None))(state, x)

        x = images().reshape(2, 16, 12)[:, :5]
        for name in ("attention/query", "attention/key", "attention/value", "attention/out", "mlp/up", "mlp/down"):
            block, (part, layer) = tiny().blocks[0], name.split("/")
            before = apply_block(block, x)
            parent = getattr(block, part)
            setattr(parent, layer, Doubled(getattr(parent, layer)))
            assert jnp.abs(apply_block(block, x) - before).max() > 1e-3, name

    def test_gradients_reach_every_parameter(self):
        graphdef, state = nnx.split(tiny())
        grads = jax.jit(jax.grad(lambda state: (nnx.merge(graphdef, state)(images()) ** 2).sum()))(state)
        for path, variable in nnx.to_flat_state(grads):
            # The bias of the keys has no gradient: it adds the same number to all scores of a query, and the softmax
            # does not depend on this number.
            if path[-2:] != ("key", "bias"):
                assert jnp.abs(variable[...]).max() > 0, path


class TestPrecisionAndMemory:
    @pytest.mark.parametrize("execution", fast(["fft", "dense"]))
    def test_adapters_are_float32_over_a_bfloat16_base(self, execution):
        base = tiny(dtype="bfloat16", param_dtype="bfloat16")
        rules = [surm_jax.Rule(TARGETS["qkv"], surm_jax.CirculantUpdate())]
        model, adapter = surm_jax.adapt(base, rules, train=["head/.*"], execution=execution, rngs=nnx.Rngs(0))
        graphdef, trained, frozen = nnx.split(model, adapter.trainable, ...)

        # The gradient of jax.nn.dot_product_attention mixes bfloat16 with the float32 of the softmax.
        with jax.numpy_dtype_promotion("standard"):
            grads = jax.jit(jax.grad(lambda t, f: (nnx.merge(graphdef, t, f)(images()) ** 2).sum()))(trained, frozen)
        grads, trained = parameter_paths_of(grads), parameter_paths_of(trained)
        assert grads.keys() == trained.keys()
        for path, variable in trained.items():
            assert variable.dtype == grads[path].dtype == jnp.float32, path
            # The update is the circulant matrix of r1 * r2. r1 is zero at the start, so the gradient of r2 is zero.
            assert (jnp.abs(grads[path][...]).max() > 0) == (not path.endswith("r2")), path
        others = re.compile(".*(norm.*|/scale)")
        kernels = {path: v.dtype for path, v in parameter_paths_of(frozen).items() if not others.fullmatch(path)}
        assert kernels
        assert set(kernels.values()) == {jnp.dtype("bfloat16")}

    @pytest.mark.exhaustive
    def test_remat_changes_memory_alone(self):
        def value_and_grad(remat):
            rules = [surm_jax.Rule(TARGETS["all-linear"], surm_jax.LoRA())]
            base = tiny(remat=remat, layer_scale=True, dropout=0.5, depth=1)
            model, adapter = surm_jax.adapt(base, rules, train=["norm/.*"], rngs=nnx.Rngs(0))
            graphdef, trained, frozen = nnx.split(model, adapter.trainable, ...)
            # Change the parameters, because at the start the gradient of one factor of each LoRA update is zero.
            trained = jax.tree.map(
                lambda a: a + 0.3 * jnp.asarray(np.sin(np.arange(a.size)).reshape(a.shape), a.dtype), trained
            )

            def loss(trained, frozen):
                return (nnx.merge(graphdef, trained, frozen)(images(), rngs=jax.random.key(0)) ** 2).sum()

            program = str(jax.make_jaxpr(jax.grad(loss))(trained, frozen))
            assert len(re.findall(r"\b(?:remat2?|checkpoint)\[", program)) == (0 if remat == "none" else 1)
            return jax.jit(jax.value_and_grad(loss))(trained, frozen)

        (value, grads), *others = (value_and_grad(remat) for remat in REMAT)
        for again, other in others:
            np.testing.assert_allclose(again, value, rtol=1e-5)
            for one, two in zip(jax.tree.leaves(grads), jax.tree.leaves(other), strict=True):
                assert jnp.abs(one).max() > 0
                np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5 * float(jnp.abs(one).max()))


class TestDropout:
    def test_only_with_rngs(self):
        exact = logits(tiny(), images())
        np.testing.assert_array_equal(logits(tiny(dropout=0.5), images()), exact)
        assert jnp.abs(logits(tiny(dropout=0.5), images(), jax.random.key(0)) - exact).max() > 1e-3

    def test_rate_zero_drops_nothing(self):
        np.testing.assert_array_equal(logits(tiny(), images(), jax.random.key(0)), logits(tiny(), images()))

    def test_the_key_decides(self):
        first, again, other = (logits(tiny(dropout=0.5), images(), jax.random.key(seed)) for seed in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert jnp.abs(first - other).max() > 1e-3

    def test_rngs_give_a_new_key_each_time(self):
        @jax.jit
        def twice(state):
            model, rngs = nnx.merge(graphdef, state), nnx.Rngs(dropout=0)
            return model(images(), rngs=rngs), model(images(), rngs=rngs)

        graphdef, state = nnx.split(tiny(dropout=0.5))
        first, second = twice(state)
        assert jnp.abs(first - second).max() > 1e-3

    def test_every_place_draws_with_a_key_of_its_own(self, monkeypatch):
        keys = []
        for module in ("vit", "layers"):
            monkeypatch.setattr(f"surm_jax.models.{module}.drop", lambda dropout, x, key: (keys.append(key), x)[1])

        @jax.jit
        def drawn_keys(state):
            nnx.merge(graphdef, state)(images(), rngs=jax.random.key(0))
            return [jax.random.key_data(key) for key in keys]

        graphdef, state = nnx.split(tiny())
        drawn = {tuple(key.tolist()) for key in drawn_keys(state)}
        assert len(drawn) == len(keys) == 1 + 3 * TINY["depth"]

    def test_modules_hold_parameters_alone(self):
        assert all(isinstance(variable, nnx.Param) for variable in parameter_paths(tiny(dropout=0.5)).values())


class TestInitialisation:
    def test_as_in_vision_transformer(self):
        config = ViTConfig(**{**TINY, "image_size": 32, "depth": 1, "width": 96, "mlp_width": 384})
        state = jax.jit(lambda: nnx.state(ViT(config, rngs=nnx.Rngs(0))))()
        values = {"/".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(state)}
        assert not values["head/kernel"].any()
        assert not values["cls_token"].any()
        assert not values["blocks/0/attention/query/bias"].any()
        np.testing.assert_allclose(values["position_embed"].std(), 0.02, rtol=0.05)
        np.testing.assert_allclose(values["blocks/0/mlp/up/bias"].std(), 1e-6, rtol=0.2)
        for path, fans in {
            "blocks/0/attention/query/kernel": 96 + 96,
            "blocks/0/attention/out/kernel": 96 + 96,
            "blocks/0/mlp/up/kernel": 96 + 384,
            "blocks/0/mlp/down/kernel": 384 + 96,
        }.items():
            bound = np.sqrt(6 / fans)  # The bound of the uniform distribution of Glorot (Xavier) initialisation.
            assert 0.98 * bound < np.abs(values[path]).max() <= bound, path
            np.testing.assert_allclose(values[path].std(), bound / np.sqrt(3), rtol=0.05)
        assert (values["blocks/0/attention/query/kernel"] != values["blocks/0/attention/key/kernel"]).all()
