import jax
import numpy as np
import pytest
from flax import nnx

from surm_jax.paths import join
from tests.training import tiny

HEAD = {"head/kernel", "head/bias"}
QKV = [f"blocks/0/attention/{name}" for name in ("query", "key", "value")]


@pytest.fixture(params=tiny.METHODS)
def built(request, built_for) -> tiny.Built:
    return built_for(request.param)


def test_what_is_trained(built):
    parameters = {join(path) for path, _ in nnx.to_flat_state(nnx.state(built.model, nnx.Param))}
    expected = {
        "circulant": {f"{path}/delta/default/{name}" for path in QKV for name in ("r1", "r2")} | HEAD,
        "lora": {f"{path}/delta/default/{name}" for path in QKV for name in ("down", "up")} | HEAD,
        "linear_probe": HEAD,
        "full": parameters,
    }[built.job.config.peft.method]
    assert set(built.trained) == expected
    frozen = {join(path) for path, _ in nnx.to_flat_state(nnx.filter_state(built.frozen, nnx.Param))}
    assert frozen == parameters - expected


def test_the_parts_make_the_model(built):
    images = tiny.batch_of(built)["image"]
    merged = built.partition.merge(built.trained, built.frozen)
    np.testing.assert_array_equal(merged(images), built.model(images))
    model = built.partition.model(built.trained, built.frozen)
    assert nnx.graphdef(model) == nnx.graphdef(built.model)
    tiny.assert_equal_bits(tiny.host(nnx.state(model)), tiny.host(nnx.state(built.model)))


def test_other_arrays_make_another_model(built):
    images = tiny.batch_of(built)["image"]
    zeroed = {path: array * 0 for path, array in built.trained.items()}
    merged = built.partition.merge(zeroed, built.frozen)
    np.testing.assert_array_equal(merged(images), np.zeros((16, 3), np.float32))
    # The original model still has its own arrays.
    assert np.abs(built.model(images)).max() > 0.01


def test_merging_works_under_jit_without_capturing_arrays(built):
    images = tiny.batch_of(built)["image"]
    jitted = jax.jit(lambda trained, frozen, images: built.partition.merge(trained, frozen)(images))
    jaxpr = jax.make_jaxpr(jitted)(built.trained, built.frozen, images)
    assert max((np.size(const) for const in jaxpr.consts), default=0) <= 1
    np.testing.assert_allclose(jitted(built.trained, built.frozen, images), built.model(images), atol=1e-5)
