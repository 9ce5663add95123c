"""Compare adapted layers with those of the library peft, and training steps with steps in torch.

The tests are skipped if the libraries in `requirements-peers.txt` are not installed.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.devices.mesh import make_mesh, put_batch, replicated
from surm_jax.models import TARGETS, ViT, ViTConfig
from surm_jax.peft import AdapterParam, CirculantUpdate, LoRA, Rule, adapt, merge
from surm_jax.pretrained.hf import architecture_of
from surm_jax.tasks import ImageClassification, objective
from surm_jax.training.config import GroupConfig, OptimConfig
from surm_jax.training.optimizer import Rates, make_optimizer
from surm_jax.training.partition import partition
from surm_jax.training.step import init_state, make_train_step
from tests.peft.models import materialize, parameters, perturb, relative_error
from tests.speeds import fast

REASON = "compares with a PyTorch library: pip install -r requirements-peers.txt"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
peft = pytest.importorskip("peft", reason=REASON)

# In each array of parameters, all dimensions have different sizes, except for the height and width of a patch. So a
# wrong transposition makes a test fail.
GEOMETRY = {"image_size": 8, "patch_size": 4, "channels": 2, "width": 12, "depth": 2, "heads": 3, "mlp_width": 20}
CLASSES = 7


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tensor(array):
    return torch.tensor(np.array(array))


def array(tensor):
    return tensor.detach().numpy()


def hub_vit(model):
    """Return a ViT of Hugging Face transformers with the weights of our model, except those of its adapter."""
    architecture = architecture_of(model.config)
    weights = {}
    for path, weight in parameters(model).items():
        if "/delta/" not in path:
            name, layout = architecture.tensor_name(model.config, path)
            weights[name] = tensor(layout.write(weight))
    config = transformers.ViTConfig.from_dict(architecture.write_config(model.config))
    theirs, info = transformers.ViTForImageClassification.from_pretrained(
        None, config=config, state_dict=weights, output_loading_info=True
    )
    assert not any(info.values()), info
    return theirs


def adapted_linear(inputs, outputs, update, config):
    """Return an adapted linear layer of this package, and one of peft, with the same kernel and bias.

    Args:
        inputs: Number of input features.
        outputs: Number of output features.
        update: The method that adapts our layer. The parameters of its update are random.
        config: The configuration of peft that adapts the layer of torch.
    """
    base = materialize(lambda: nnx.Linear(inputs, outputs, rngs=nnx.Rngs(0)))
    model = perturb(*adapt(base, [Rule("", update)], rngs=nnx.Rngs(1)))
    linear = torch.nn.Linear(inputs, outputs)
    linear.load_state_dict({"weight": tensor(base.kernel[...].T), "bias": tensor(base.bias[...])})
    return model, peft.get_peft_model(torch.nn.Sequential(linear), config)


def assert_same_layer(model, peer, x, dy):
    """Check that an adapted layer of this package and one of peft compute the same.

    Compared are the outputs, the merged kernels, and the gradients of the input. The gradients of the updates'
    parameters are left to the caller. Those of peft's layer are in the attribute `grad` of its parameters.

    Returns:
        The gradients of `sum(dy * y)` for the arrays of our update, by name.
    """
    graphdef, arrays, frozen = nnx.split(model, AdapterParam, ...)

    def product(arrays, x):
        y = nnx.merge(graphdef, arrays, frozen)(x)
        return (y * dy).sum(), y

    (by_arrays, by_x), y = jax.jit(jax.grad(product, argnums=(0, 1), has_aux=True))(arrays, jnp.asarray(x))
    peer_x, layer = tensor(x).requires_grad_(), peer.base_model.model[0]
    peer_y = peer(peer_x.detach())
    peer_y.backward(tensor(dy))
    assert relative_error(y, array(peer_y)) <= 1e-5
    layer.merge()
    assert relative_error(merge(model)[0].kernel[...], array(layer.base_layer.weight).T) <= 1e-6
    # Compute peft's gradient of x with the merged layer, because the backward function of its C3A is wrong for x. In
    # peft 0.18.0 and 0.21.2 it uses w[a + i] instead of w[a - i], and `torch.autograd.gradcheck` fails.
    peer(peer_x).backward(tensor(dy))
    assert relative_error(by_x, array(peer_x.grad)) <= 1e-5
    return {path[-1]: variable[...] for path, variable in nnx.to_flat_state(by_arrays)}


@pytest.mark.parametrize("size", fast([8, 15]))
def test_our_circulant_is_c3a_of_one_block(size):
    """Check that C3A with one block computes the same update as `CirculantUpdate`.

    C3A adds `sum_a x[a] w[(a - i) mod n] / n` to the output i of a layer. `CirculantUpdate` adds
    `alpha * sum_a x[a] c[(i - a) mod n]` with `c = r1 * r2`. They are equal if `w[k] = n * alpha * c[-k mod n]`.
    """
    alpha = 0.7
    config = peft.C3AConfig(block_size=size, target_modules=["0"])
    model, peer = adapted_linear(size, size, CirculantUpdate(alpha=alpha), config)
    r1, r2 = model.delta["default"].r1[...], model.delta["default"].r2[...]
    backwards = -np.arange(size) % size
    kernel = peer.base_model.model[0].c3a_kernel["default"]
    kernel.data[0, 0] = tensor(size * alpha * (r1 * r2)[backwards])

    gradients = assert_same_layer(model, peer, normal(0, 2, 3, size), normal(1, 2, 3, size))
    by_c = size * alpha * array(kernel.grad)[0, 0][backwards]
    assert relative_error(gradients["r1"], by_c * r2) <= 1e-5
    assert relative_error(gradients["r2"], by_c * r1) <= 1e-5


@pytest.mark.parametrize(("inputs", "outputs"), fast([(10, 6), (6, 10)], unpack=True))
def test_our_lora_is_that_of_peft(inputs, outputs):
    config = peft.LoraConfig(r=3, lora_alpha=2, target_modules=["0"])
    model, peer = adapted_linear(inputs, outputs, LoRA(rank=3, alpha=2.0), config)
    lora_A, lora_B = (getattr(peer.base_model.model[0], name)["default"].weight for name in ("lora_A", "lora_B"))
    lora_A.data, lora_B.data = tensor(model.delta["default"].down[...].T), tensor(model.delta["default"].up[...].T)

    gradients = assert_same_layer(model, peer, normal(0, 2, 3, inputs), normal(1, 2, 3, outputs))
    assert relative_error(gradients["down"], array(lora_A.grad).T) <= 1e-5
    assert relative_error(gradients["up"], array(lora_B.grad).T) <= 1e-5


def random_vit():
    """Return a ViT with random parameters.

    The outputs of its layers are so small that a wrong epsilon of the LayerNorms would change the results.
    """
    model = materialize(lambda: ViT(ViTConfig(**GEOMETRY, num_classes=CLASSES), rngs=nnx.Rngs(0)))
    layers = [model.patch_embed, *(layer for block in model.blocks for layer in (block.attention.out, block.mlp.down))]
    added = [model.cls_token, model.position_embed, *(v for layer in layers for v in (layer.kernel, layer.bias))]
    for variable in added:
        variable[...] = 0.1 * variable[...]
    return model


STEPS, SMOOTHING, CLIP = 5, 0.1, 0.6
ADAPTER = {"learning_rate": 0.03, "weight_decay": 0.1}
HEAD = {"learning_rate": 0.01, "weight_decay": 0.5}
BATCHES = [
    {"image": normal(step, 6, 8, 8, 2), "label": np.arange(step, step + 6, dtype=np.int32) % CLASSES}
    for step in range(STEPS)
]


def train(model, adapter):
    """Train a model of this package for `STEPS` steps.

    Returns:
        The loss and the gradient norm of every step, of shape (STEPS, 2), and the trained arrays after the last step.
    """
    config = OptimConfig(steps=STEPS, decay="constant", clip_norm=CLIP)
    groups = {"adapter": GroupConfig(pattern=".*/delta/.*", **ADAPTER), "head": GroupConfig(pattern="head/.*", **HEAD)}
    config = dataclasses.replace(config, groups=dataclasses.replace(config.groups, **groups))
    parts, trained, frozen = partition(model, adapter)
    optimizer, rates, mesh = make_optimizer(config, trained), Rates(config, "lora", trained), make_mesh(1, {})
    step = make_train_step(
        parts, ImageClassification.forward, objective.CLASSES, optimizer, mesh, label_smoothing=SMOOTHING
    )
    curve = []
    with jax.set_mesh(mesh):
        state, frozen = init_state(trained, optimizer, mesh), jax.device_put(frozen, replicated(mesh))
        for number, batch in enumerate(BATCHES, 1):
            state, metrics = step(state, frozen, put_batch(batch, mesh), jax.random.key(0), rates.before(number))
            curve.append([float(metrics["train_loss"]), float(metrics["gradient_norm"])])
    return np.array(curve), state.trained


def train_peer(peer, adapter, head):
    """Train a model of peft in torch for `STEPS` steps, as `train` trains a model of this package.

    Args:
        peer: The model.
        adapter: The parameters of the adapter, which are trained.
        head: The parameters of the head, which are trained, too.

    Returns:
        The loss and the gradient norm of every step, of shape (STEPS, 2).
    """
    settings = [{"lr": group["learning_rate"], "weight_decay": group["weight_decay"]} for group in (ADAPTER, HEAD)]
    optimizer = torch.optim.AdamW([{"params": adapter, **settings[0]}, {"params": head, **settings[1]}])
    curve = []
    for batch in BATCHES:
        logits = peer(tensor(batch["image"].transpose(0, 3, 1, 2))).logits
        loss = torch.nn.functional.cross_entropy(logits, tensor(batch["label"]).long(), label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([*adapter, *head], CLIP)
        optimizer.step()
        curve.append([loss.item(), norm.item()])
    return np.array(curve)


@pytest.mark.exhaustive
def test_our_training_is_that_of_torch():
    model, adapter = adapt(random_vit(), [Rule(TARGETS["qkv"], LoRA())], train=["head/.*"], rngs=nnx.Rngs(1))
    model = perturb(model, adapter)
    base = hub_vit(model)
    config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=r".*\.(query|key|value|[qkv]_proj)")
    peer = peft.get_peft_model(base, config)
    head = [base.classifier.weight.requires_grad_(), base.classifier.bias.requires_grad_()]
    names = ("query", "key", "value")
    paths = [f"blocks/{index}/attention/{name}/delta/default" for index in range(2) for name in names]
    layers = [module for module in peer.modules() if hasattr(module, "lora_A")]
    ours, factors = parameters(model), {}
    for path, layer in zip(paths, layers, strict=True):
        factors[f"{path}/down"], factors[f"{path}/up"] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for name in ("down", "up"):
            factors[f"{path}/{name}"].data = tensor(ours[f"{path}/{name}"].T)

    peer_curve = train_peer(peer, list(factors.values()), head)
    curve, trained = train(model, adapter)
    # Check that the gradients of some steps were clipped, and that the losses changed by far more than the tolerance.
    assert (curve[:, 1] > CLIP).any()
    assert np.ptp(curve[:, 0]) > 0.1
    np.testing.assert_allclose(curve, peer_curve, rtol=1e-4)
    factors = {path: array(factor).T for path, factor in factors.items()}
    factors.update({"head/kernel": array(head[0]).T, "head/bias": array(head[1])})
    assert trained.keys() == factors.keys()
    for path, factor in factors.items():
        assert relative_error(trained[path], factor) <= 1e-4, path
