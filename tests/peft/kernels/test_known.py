"""Classes of other libraries are known by name. Classes of the same names stand for them; tests/peers has theirs."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft import LoRA, Rule, adapt, merge
from surm_jax.peft.kernels import KINDS
from tests.peft.models import perturb


class Tunix(nnx.Module):
    def __init__(self):
        self.einsum_str, self.w = "btd,dnh->btnh", nnx.Param(nnx.Rngs(0).normal((4, 2, 3)))

    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w[...])


class Bonsai(nnx.Module):
    def __init__(self):
        self.kernel, self.bias = nnx.Param(nnx.Rngs(0).normal((4, 3))), nnx.Param(jnp.arange(3.0))

    def __call__(self, x, *, out_sharding):
        return x @ self.kernel[...] + self.bias[...][None, None]


class MaxText(nnx.Module):
    def __init__(self, axis=(-2, -1)):
        self.in_features_shape, self.out_features_shape, self.axis, self.quant = (2, 2), (3,), axis, None
        self.kernel = nnx.Param(nnx.Rngs(0).normal((2, 2, 3)))

    def __call__(self, x, _initializing=False):
        return jnp.tensordot(x.reshape(2, 5, 2, 2), self.kernel[...], 2)


for cls, name in (
    (Tunix, "tunix.models.llama3.model.Einsum"),
    (Bonsai, "bonsai.models.llada.modeling.ShardedLinear"),
    (MaxText, "maxtext.layers.linears.DenseGeneral"),
):
    cls.__module__, _, cls.__qualname__ = name.rpartition(".")


@pytest.mark.parametrize(("cls", "settings"), [(Tunix, {}), (Bonsai, {"out_sharding": None}), (MaxText, {})])
def test_an_update_acts_at_the_product_of_a_known_class(cls, settings):
    model, x = cls(), nnx.Rngs(1).normal((2, 5, 2, 2) if cls is MaxText else (2, 5, 4))
    adapted, adapter = adapt(model, [Rule("", LoRA(rank=2))], rngs=nnx.Rngs(2))
    assert cls in KINDS and type(adapted).__name__ == f"Adapted{cls.__name__}"
    np.testing.assert_array_equal(adapted(x, **settings), model(x, **settings))
    adapted = perturb(adapted, adapter)
    merged, _ = merge(adapted)
    np.testing.assert_allclose(adapted(x, **settings), merged(x, **settings), rtol=1e-5, atol=1e-5)
    assert np.abs(adapted(x, **settings) - model(x, **settings)).max() > 1e-2


def test_axes_that_are_not_the_last_ones_are_refused():
    with pytest.raises(UserError, match="contracts other axes than the last ones"):
        adapt(MaxText(axis=(0, 1)), [Rule("", LoRA())], rngs=nnx.Rngs(0))
