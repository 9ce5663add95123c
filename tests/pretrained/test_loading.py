import jax
import numpy as np
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.models import ViT, ViTConfig
from surm_jax.pretrained import load


@pytest.fixture
def checkpoint(tmp_path, augreg_arrays, tiny_geometry):
    np.savez(tmp_path / "vit.npz", **augreg_arrays(**tiny_geometry))
    return tmp_path / "vit.npz"


def flat(state):
    return {"/".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(state)}


@pytest.fixture(scope="module")
def initial(tiny_geometry):
    """The initial values of the tiny ViT, built the plain way."""
    return flat(nnx.state(ViT(ViTConfig(**tiny_geometry), rngs=nnx.Rngs(3))))


def test_no_checkpoint_is_the_initialisation(initial, tiny_geometry):
    loaded = flat(nnx.state(load(lambda: ViT(ViTConfig(**tiny_geometry), rngs=nnx.Rngs(3)), None)))
    assert loaded.keys() == initial.keys()
    for path, array in initial.items():
        np.testing.assert_allclose(loaded[path], array, rtol=1e-6, err_msg=path)


def test_fresh_parameters_are_initialised_and_others_are_not(checkpoint, initial, tiny_geometry):
    config = ViTConfig(**tiny_geometry)
    model = load(lambda: ViT(config, rngs=nnx.Rngs(3)), checkpoint, fresh=(r"head/.*", r"blocks/1/mlp/.*"))
    loaded = flat(nnx.state(model))
    for path, array in initial.items():
        if path.startswith(("head/", "blocks/1/mlp/")):
            np.testing.assert_allclose(loaded[path], array, rtol=1e-6, err_msg=path)
        else:
            assert np.abs(loaded[path] - array).max() > 1e-4, path


def test_the_model_is_never_built_with_numbers(checkpoint, tiny_geometry):
    seen = []

    def make():
        model = ViT(ViTConfig(**tiny_geometry), rngs=nnx.Rngs(0))
        seen.append(isinstance(model.blocks[0].mlp.up.kernel[...], jax.core.Tracer))
        return model

    model = load(make, checkpoint)
    assert seen
    assert all(seen)
    assert all(isinstance(variable[...], jax.Array) for _, variable in nnx.to_flat_state(nnx.state(model)))


def test_only_fresh_parameters_are_computed(checkpoint, tiny_geometry, monkeypatch):
    """What the compiled initialiser returns is the head alone."""
    returned = []
    jit = jax.jit

    def spy(function):
        compiled = jit(function)

        def call():
            returned.append(compiled())
            return returned[-1]

        return call

    monkeypatch.setattr("surm_jax.pretrained.loading.jax.jit", spy)
    load(lambda: ViT(ViTConfig(**tiny_geometry), rngs=nnx.Rngs(0)), checkpoint)
    assert [sorted(values) for values in returned] == [["head/bias", "head/kernel"]]


def test_pattern_that_matches_nothing(checkpoint, tiny_geometry):
    with pytest.raises(UserError, match=r"'head/kernl' matches no parameter .*: head/kernel, "):
        load(lambda: ViT(ViTConfig(**tiny_geometry), rngs=nnx.Rngs(0)), checkpoint, fresh=("head/kernl",))


def test_unknown_format_and_missing_file(checkpoint, tiny_geometry, tmp_path):
    def make():
        return ViT(ViTConfig(**tiny_geometry), rngs=nnx.Rngs(0))

    other = checkpoint.rename(tmp_path / "vit.bin")
    with pytest.raises(UserError, match=r"suffix '.bin'; checkpoints are .npz or .safetensors files"):
        load(make, other)
    with pytest.raises(UserError, match=r"no checkpoint file .*absent\.npz"):
        load(make, tmp_path / "absent.npz")
