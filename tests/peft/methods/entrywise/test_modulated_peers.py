"""Compare HiRA with that of Hugging Face's peft. The test is skipped if torch or peft is not installed."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.peft import HiRA, Rule, adapt
from tests.peft.models import relative_error

REASON = "compares with a PyTorch library: pip install -r requirements-peers.txt"
torch = pytest.importorskip("torch", reason=REASON)
peft = pytest.importorskip("peft", reason=REASON)


def test_hira_computes_what_peft_computes():
    theirs = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(6, 10)), peft.HiraConfig(r=3, target_modules=["0"], init_weights=False)
    ).eval()
    layer = theirs.base_model.model[0]
    ours = nnx.Linear(6, 10, rngs=nnx.Rngs(0))
    ours.kernel[...] = jnp.asarray(layer.base_layer.weight.detach().numpy().T)
    ours.bias[...] = jnp.asarray(layer.base_layer.bias.detach().numpy())
    ours, _ = adapt(ours, [Rule("", HiRA(rank=3))], rngs=nnx.Rngs(1))
    part = ours.delta["default"]
    part.down[...] = jnp.asarray(layer.hira_A["default"].detach().numpy().T)
    part.up[...] = jnp.asarray(layer.hira_B["default"].detach().numpy().T)
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    with torch.no_grad():
        expected, frozen = theirs(torch.tensor(x)).numpy(), layer.base_layer(torch.tensor(x)).numpy()
    assert relative_error(expected, frozen) > 0.01
    assert relative_error(ours(jnp.asarray(x)), expected) <= 1e-6
