"""Comparison of `ViT` with the image models of Hugging Face transformers, which run in PyTorch.

In this file, "ours" and "theirs" are the results or models of this package and of transformers. The tests are skipped
if the libraries in `requirements-peers.txt` are not installed.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from surm_jax.pretrained.hf import ARCHITECTURES, architecture_of
from tests.pretrained.hf.hf_trees import read_tree, written_tree
from tests.speeds import fast

REASON = "compares with a PyTorch library: pip install -r requirements-peers.txt"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

CLASSES = 7

# In each array of a checkpoint, all dimensions have different sizes, except for the height and width of a patch. So a
# wrong transposition makes a test fail. The epsilon of LayerNorm is so large that a wrong value of it would change the
# results.
GEOMETRY = {
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 2,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "layer_norm_eps": 1e-3,
}
LABELS = {"num_labels": CLASSES}
DINOV2 = {**{name: size for name, size in GEOMETRY.items() if name != "intermediate_size"}, "mlp_ratio": 2}
TEXT = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 9,
    "vocab_size": 10,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CASES = {
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**GEOMETRY, **LABELS)),
    "augreg": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**{**GEOMETRY, "layer_norm_eps": 1e-6}, **LABELS, hidden_act="gelu_pytorch_tanh")
    ),
    "no_bias": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**GEOMETRY, **LABELS, qkv_bias=False, hidden_act="relu")
    ),
    "deit": lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**GEOMETRY, **LABELS)),
    "ijepa": lambda: transformers.IJepaForImageClassification(transformers.IJepaConfig(**GEOMETRY, **LABELS)),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**DINOV2, **LABELS)),
    "clip": lambda: transformers.CLIPForImageClassification(
        transformers.CLIPConfig(vision_config=GEOMETRY, text_config=TEXT, **LABELS)
    ),
    "clip_projection": lambda: transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**GEOMETRY, projection_dim=CLASSES)
    ),
}
# Models of transformers whose checkpoints have parameters that our model lacks, or have no head.
OTHERS = {
    "bare_vit": lambda: transformers.ViTModel(transformers.ViTConfig(**GEOMETRY)),
    "two_heads": lambda: transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**GEOMETRY)),
    "bare_dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2)),
    "bare_clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**GEOMETRY)),
    "text_and_images": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(vision_config=GEOMETRY, text_config=TEXT, projection_dim=CLASSES)
    ),
}
# Parameters that models of transformers have but do not use. Our model has no such parameters. In the checkpoints that
# we write, they have their initial values.
UNUSED = {"clip": "post_layernorm", "dinov2": "mask_token"}


@functools.cache
def peer(name):
    """Return the model of transformers for a key of `CASES` or `OTHERS`, with noise added to its parameters."""
    torch.manual_seed(0)
    model = (CASES | OTHERS)[name]().eval()
    for path, parameter in model.named_parameters():
        if UNUSED.get(name, " ") not in path:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def fields_of(config):
    return json.loads(config.to_json_string(use_diff=False))


def full_config(model):
    return {**fields_of(model.config), "architectures": [type(model).__name__]}


def arrays_of(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


@functools.cache
def read_peer(name, fresh=()):
    """Return our model with the weights of `peer(name)`, and the `Architecture` that converted them.

    Args:
        name: A name in `CASES` or `OTHERS`.
        fresh: Prefixes of the paths of parameters that are not in the checkpoint, such as `head/`.
    """
    fields = full_config(peer(name))
    architecture = ARCHITECTURES[fields["model_type"]]
    return read_tree(architecture, architecture.read_config(fields, {}), arrays_of(peer(name)), fresh), architecture


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pixels(images):
    return torch.tensor(images.transpose(0, 3, 1, 2))


def output(result):
    return result.image_embeds if hasattr(result, "image_embeds") else result.logits


def relative_error(ours, theirs):
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert ours.shape == theirs.shape
    return np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("name", fast(CASES))
def test_hidden_states_logits_and_gradients(name):
    images, by_logits = normal(0, 3, 8, 8, 2), normal(1, 3, CLASSES)
    inputs = pixels(images).requires_grad_()
    result = peer(name)(pixel_values=inputs, output_hidden_states=True)
    output(result).backward(torch.tensor(by_logits))

    graphdef, state = nnx.split(read_peer(name)[0])

    def loss(images):
        model = nnx.merge(graphdef, state)
        logits = model(images)
        return (logits * by_logits).sum(), (logits, model.hidden_states(images))

    by_images, (logits, hidden) = jax.jit(jax.grad(loss, has_aux=True))(jnp.asarray(images))
    for ours, theirs in zip(hidden, result.hidden_states, strict=True):
        assert relative_error(ours, theirs) <= 1e-5
    assert relative_error(logits, output(result)) <= 1e-5
    assert relative_error(by_images, inputs.grad.numpy().transpose(0, 2, 3, 1)) <= 1e-4


@pytest.mark.parametrize("name", fast(CASES))
def test_another_image_size(name):
    images = normal(2, 2, 12, 12, 2)
    # DINOv2 has no such option, because it always interpolates the position embeddings.
    options = {} if name == "dinov2" else {"interpolate_pos_encoding": True}
    theirs = output(peer(name)(pixel_values=pixels(images), **options))

    fields, architecture = full_config(peer(name)), read_peer(name)[1]
    config = architecture.read_config(fields, {"image_size": 12})
    graphdef, state = nnx.split(read_tree(architecture, config, arrays_of(peer(name))))
    ours = jax.jit(lambda state: nnx.merge(graphdef, state)(jnp.asarray(images)))(state)
    assert relative_error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("name", fast(CASES))
def test_what_they_save_is_read_and_written_bit_for_bit(name, tmp_path):
    peer(name).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    in_memory, architecture = read_peer(name)
    model = read_tree(architecture, in_memory.config, saved)
    assert architecture_of(model.config) is architecture
    for (path, ours), (_, same) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (model, in_memory)), strict=True):
        assert np.array_equal(ours[...], same[...]), path
    written = written_tree(architecture, model)
    assert written.keys() == saved.keys()
    for key, array in saved.items():
        assert (written[key].dtype, written[key].shape) == (array.dtype, array.shape), key
        assert written[key].tobytes() == array.tobytes(), key


@pytest.mark.parametrize("name", fast(CASES))
def test_configurations_go_there_and_back(name, tmp_path):
    model, architecture = read_peer(name)
    written = architecture.write_config(model.config)
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is type(peer(name).config)
    # Skip the configuration of CLIP's text model, which our model does not have.
    skipped = ("_name_or_path", "dtype", "text_config")
    ours, expected = (
        {key: value for key, value in fields.items() if key not in skipped}
        for fields in (fields_of(theirs), full_config(peer(name)))
    )
    for fields in (ours, expected):
        if name == "clip":
            fields["vision_config"] = {**fields["vision_config"], **dict.fromkeys(skipped)}
    assert ours == expected
    assert architecture.read_config(ours, {}) == architecture.read_config(written, {}) == model.config
    # Check that the class of transformers loads what we write, without missing or unexpected keys.
    tensors = {key: torch.tensor(np.array(array)) for key, array in written_tree(architecture, model).items()}
    loaded, info = type(peer(name)).from_pretrained(None, config=theirs, state_dict=tensors, output_loading_info=True)
    assert not any(info.values()), info
    for key, value in peer(name).state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize("name", fast(OTHERS))
def test_bodies_of_other_checkpoints(name, tmp_path):
    fresh = () if name == "text_and_images" else ("head/",)
    in_memory, architecture = read_peer(name, fresh)
    peer(name).save_pretrained(tmp_path)
    model = read_tree(architecture, in_memory.config, load_file(tmp_path / "model.safetensors"), fresh)
    for (path, ours), (_, same) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (model, in_memory)), strict=True):
        assert np.array_equal(ours[...], same[...]), path
    if name == "text_and_images":
        images = normal(0, 3, 8, 8, 2)
        theirs = peer(name).get_image_features(pixels(images)).pooler_output
        graphdef, state = nnx.split(model)
        ours = jax.jit(lambda state: nnx.merge(graphdef, state)(jnp.asarray(images)))(state)
        assert relative_error(ours, theirs) <= 1e-5
