import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from surm_jax.errors import UserError
from surm_jax.models import ViT, ViTConfig
from surm_jax.pretrained import from_pretrained, load, model_config
from surm_jax.pretrained.hf import ARCHITECTURES


@pytest.fixture
def checkpoint(tmp_path, augreg_arrays, tiny_geometry):
    np.savez(tmp_path / "vit.npz", **augreg_arrays(**tiny_geometry))
    return tmp_path / "vit.npz"


def flat(state):
    return {"/".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(state)}


@pytest.fixture(scope="module")
def initial(tiny_geometry):
    """The initial values of the tiny ViT's parameters, from a model that was built without `load`."""
    return flat(nnx.state(ViT(ViTConfig(**tiny_geometry), rngs=nnx.Rngs(3))))


def test_no_checkpoint_is_the_initialisation(initial, tiny_geometry):
    loaded = flat(nnx.state(load(None, lambda: ViT(ViTConfig(**tiny_geometry), rngs=nnx.Rngs(3)))))
    assert loaded.keys() == initial.keys()
    for path, array in initial.items():
        np.testing.assert_allclose(loaded[path], array, rtol=1e-6, err_msg=path)


def test_fresh_parameters_are_initialised_and_others_are_not(checkpoint, initial, tiny_geometry):
    config = ViTConfig(**tiny_geometry)
    model = load(checkpoint, lambda: ViT(config, rngs=nnx.Rngs(3)), fresh=(r"head/.*", r"blocks/1/mlp/.*"))
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

    model = load(checkpoint, make)
    assert seen
    assert all(seen)
    assert all(isinstance(variable[...], jax.Array) for _, variable in nnx.to_flat_state(nnx.state(model)))


def test_only_fresh_parameters_are_computed(checkpoint, tiny_geometry, monkeypatch):
    """Check that the compiled initialiser computes only the parameters in `fresh`, which are those of the head."""
    returned = []
    jit = jax.jit

    def spy(function, **options):
        compiled = jit(function, **options)

        def call():
            returned.append(compiled())
            return returned[-1]

        return call

    monkeypatch.setattr("surm_jax.pretrained.loading.jax.jit", spy)
    load(checkpoint, lambda: ViT(ViTConfig(**tiny_geometry), rngs=nnx.Rngs(0)))
    assert [sorted(values) for values in returned] == [["head/bias", "head/kernel"]]


def test_pattern_that_matches_nothing(checkpoint, tiny_geometry):
    with pytest.raises(UserError, match=r"'head/kernl' matches no parameter .*: head/kernel, "):
        load(checkpoint, lambda: ViT(ViTConfig(**tiny_geometry), rngs=nnx.Rngs(0)), fresh=("head/kernl",))


def test_unknown_formats(checkpoint, tiny_geometry, tmp_path):
    def make():
        return ViT(ViTConfig(**tiny_geometry), rngs=nnx.Rngs(0))

    other = checkpoint.rename(tmp_path / "vit.h5")
    with pytest.raises(UserError, match=r"suffix '.h5'; checkpoints are .npz or .safetensors files, or folders of"):
        load(other, make)
    with pytest.raises(UserError, match=r"suffix '.bin'.*pickles are not loaded"):
        load(other.rename(tmp_path / "vit.bin"), make)
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match=f"pass its folder {tmp_path} instead"):
        load(tmp_path / "config.json", make)
    with pytest.raises(UserError, match=r"no checkpoint file .*absent\.npz"):
        load(tmp_path / "absent.npz", make)


def test_every_parameter_is_where_it_is_wanted(checkpoint, initial, tiny_geometry):
    """Check that read and initialised parameters have the sharding that the function `sharding` returns.

    It splits arrays over 8 devices if 8 divides the size of an axis, and replicates the others.
    """
    geometry = {**tiny_geometry, "num_classes": 16}
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    asked = {}

    def sharding(path, shape):
        axes = next((i for i, size in enumerate(shape.shape) if size % 8 == 0), None)
        spec = () if axes is None else (*[None] * axes, "fsdp")
        asked[path] = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return asked[path]

    def check(model):
        state = dict(nnx.to_flat_state(nnx.state(model)))
        assert {"/".join(map(str, path)) for path in state} == asked.keys() == initial.keys()
        for path, variable in state.items():
            assert variable[...].sharding == asked["/".join(map(str, path))], path
        assert asked["head/kernel"].spec == jax.sharding.PartitionSpec(None, "fsdp")

    def make():
        return ViT(ViTConfig(**geometry), rngs=nnx.Rngs(3))

    check(load(None, make, sharding=sharding))
    model = load(checkpoint, make, sharding=sharding)
    check(model)
    for path, array in flat(nnx.state(load(checkpoint, make))).items():
        np.testing.assert_array_equal(flat(nnx.state(model))[path], array, err_msg=path)


def test_from_pretrained_augreg(checkpoint, tiny_geometry, monkeypatch):
    sizes = {name: size for name, size in tiny_geometry.items() if name != "num_classes"}
    monkeypatch.setattr(ViTConfig, "VARIANTS", {"tiny": sizes})
    model = from_pretrained(checkpoint, variant="tiny", num_classes=9, image_size=20, seed=5)
    assert model.config == ViTConfig(**{**tiny_geometry, "num_classes": 9, "image_size": 20})
    whole = from_pretrained(str(checkpoint), variant="tiny", num_classes=7, fresh=())
    with np.load(checkpoint) as file:
        np.testing.assert_array_equal(whole.head.kernel[...], file["head/kernel"])
    for options in ({}, {"variant": "tiny"}, {"num_classes": 7}):
        with pytest.raises(UserError, match=r"vit\.npz holds no configuration, .*: give variant=.* and num_classes="):
            from_pretrained(checkpoint, **options)
    with pytest.raises(UserError, match=r"vit\.npz holds no configuration, as no \.npz file does: give variant="):
        model_config(checkpoint)


def test_from_pretrained_of_a_file_that_knows_its_model():
    model = from_pretrained("digits")
    assert np.asarray(model.head.kernel[...]).any()
    fresh = from_pretrained("digits", num_classes=20, dtype="bfloat16", image_size=12)
    assert not np.asarray(fresh.head.kernel[...]).any()
    assert fresh.config.dtype == "bfloat16"
    assert fresh.position_embed.shape == (1, 36, 64)
    np.testing.assert_array_equal(fresh.blocks[3].mlp.up.kernel[...], model.blocks[3].mlp.up.kernel[...])
    some, other = (from_pretrained("digits", fresh=(r"position_embed",), seed=seed) for seed in (1, 2))
    assert not np.array_equal(some.position_embed[...], other.position_embed[...])
    np.testing.assert_array_equal(some.head.kernel[...], model.head.kernel[...])
    with pytest.raises(UserError, match="already says which model it holds: leave out variant='B/16'"):
        from_pretrained("digits", variant="B/16")
    with pytest.raises(UserError, match=r"'none' is no checkpoint"):
        from_pretrained("none")
    with pytest.raises(UserError, match=r"ViTConfig has no field 'image_sise'.*did you mean 'image_size'"):
        from_pretrained("digits", image_sise=12)
    with pytest.raises(UserError, match="depth is 4 in the file and 5 in the model"):
        from_pretrained("digits", depth=5)


PEAK = """
import pathlib, sys
import jax
from flax import nnx
from surm_jax.pretrained import load, model_config

def memory(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

small, large = map(pathlib.Path, sys.argv[1:])
def read(path):
    model, config = model_config(path)
    return load(path, lambda: model(config, rngs=nnx.Rngs(0)))
read(small)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # Reset the peak.
before = memory("VmRSS")
model = read(large)
held = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
print(held, memory("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of memory from Linux's /proc")
@pytest.mark.exhaustive
def test_memory_is_the_model_once(tmp_path):
    """Check that loading a model of 300 MB needs little more memory than one copy of the model.

    Memory that loading a small model also needs, for JAX and compiled programs, is not counted.
    """
    fields = {
        "model_type": "vit",
        "image_size": 32,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 64,
    }
    large = {**fields, "hidden_size": 1024, "num_hidden_layers": 6, "intermediate_size": 4096}
    write_zeros(tmp_path / "small", fields)
    write_zeros(tmp_path / "large", large)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    run = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    held, peak = map(int, run.stdout.split())
    assert held > 300e6
    # Two copies of the model, or a memory-mapped file in addition to the arrays, would need twice `held`. The bounds
    # leave room for the allocator, which may keep or reuse an array of 17 MB.
    assert 0.9 * held < peak < 1.5 * held


def write_zeros(folder, fields):
    """Write a folder of transformers with this `config.json` and arrays of zeros."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    model, config = model_config(folder)
    abstract = nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0)))
    arrays = {}
    for path, variable in nnx.to_flat_state(nnx.state(abstract)):
        name, tensor = ARCHITECTURES["vit"].tensor_name(config, "/".join(map(str, path)))
        arrays[name] = np.ascontiguousarray(tensor.write(np.zeros(variable.shape, variable.dtype)))
    save_file(arrays, folder / "model.safetensors")
