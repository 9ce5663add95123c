import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft.kernels import check_call, is_linear, matrix_view
from tests.peft.models import Gated, materialize


class ReadsKernel(nnx.Linear):
    def __call__(self, x):
        return x @ self.kernel[...]


class WithoutBias(ReadsKernel):
    """A layer that inherits a `__call__` without `super()` from its parent class."""


class InfersShape(Gated):
    """A layer that inherits a `__call__` with `super()` from its parent class."""


def stacked(make):
    return nnx.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 3))


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda rngs: nnx.Linear(6, 4, rngs=rngs), (6,)),
        (lambda rngs: nnx.Linear(6, 4, rngs=rngs), (2, 3, 6)),
        (lambda rngs: nnx.LinearGeneral(6, (2, 4), rngs=rngs), (3, 6)),
        (lambda rngs: nnx.LinearGeneral((2, 3), 5, axis=(-2, -1), rngs=rngs), (4, 2, 3)),
        (lambda rngs: nnx.LinearGeneral((3, 3), 5, axis=(-1, -2), rngs=rngs), (4, 3, 3)),
        (lambda rngs: nnx.LinearGeneral((2, 3), (4, 5), axis=(0, 2), rngs=rngs), (2, 7, 3)),
        (lambda rngs: nnx.LinearGeneral((2, 2), 5, axis=(2, 0), rngs=rngs), (2, 7, 2)),
        (lambda rngs: nnx.LinearGeneral(6, 5, axis=1, rngs=rngs), (2, 6, 3)),
    ],
)
def test_the_matrix_does_what_the_layer_does(make, inputs):
    layer = materialize(lambda: make(nnx.Rngs(0)))
    layer.bias[...] = jnp.zeros_like(layer.bias[...])
    x = jnp.asarray(np.random.default_rng(3).normal(size=inputs), jnp.float32)
    view = matrix_view(layer, "layer")
    vectors = view.vectors(x)
    assert vectors.shape[-1] == view.shape[0]
    # This tests the reshaping: NumPy computes the product of the reshaped arrays, and the layer the expected output.
    product = np.asarray(vectors, np.float64) @ np.asarray(layer.kernel[...], np.float64).reshape(view.shape)
    np.testing.assert_allclose(view.outputs(jnp.asarray(product, jnp.float32)), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "linear"),
    [
        (lambda rngs: nnx.Linear(2, 3, rngs=rngs), True),
        (lambda rngs: nnx.LinearGeneral(2, (3, 4), rngs=rngs), True),
        (lambda rngs: Gated(2, 3, rngs=rngs), True),
        (lambda rngs: nnx.Conv(2, 3, kernel_size=(1,), rngs=rngs), False),
        (lambda rngs: nnx.Embed(2, 3, rngs=rngs), False),
        (lambda rngs: nnx.LayerNorm(2, rngs=rngs), False),
    ],
)
def test_is_linear(make, linear):
    assert is_linear(nnx.eval_shape(lambda: make(nnx.Rngs(0)))) is linear


def test_batch_axes_are_refused():
    layer = nnx.LinearGeneral(4, 5, axis=-1, batch_axis={0: 3}, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"^blocks/experts cannot be adapted: .*batch axes \{0: 3\}"):
        matrix_view(layer, "blocks/experts")


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda rngs: nnx.Linear(4, 5, rngs=rngs), r"\(3, 4, 5\)"),
        (lambda rngs: nnx.LinearGeneral(4, (5, 2), rngs=rngs), r"\(3, 4, 5, 2\)"),
    ],
)
def test_a_stack_of_layers_is_refused(make, shape):
    with pytest.raises(UserError, match=rf"^blocks/up cannot be adapted: .*{shape}"):
        matrix_view(nnx.eval_shape(lambda: stacked(make)), "blocks/up")


@pytest.mark.parametrize("cls", [nnx.Linear, Gated, InfersShape, nnx.LoRALinear])
def test_a_call_through_super_is_accepted(cls):
    options = {"lora_rank": 1} if cls is nnx.LoRALinear else {}
    check_call(cls(2, 3, rngs=nnx.Rngs(0), **options), "layer", "delta")


@pytest.mark.parametrize("cls", [ReadsKernel, WithoutBias])
def test_a_call_past_super_is_refused(cls):
    with pytest.raises(UserError, match=r"^body/up cannot be adapted: ReadsKernel\.__call__ does not call super"):
        check_call(cls(2, 3, rngs=nnx.Rngs(0)), "body/up", "delta")


@pytest.mark.parametrize("cls", [ReadsKernel, WithoutBias])
def test_a_branch_can_be_added_after_any_call(cls):
    check_call(cls(2, 3, rngs=nnx.Rngs(0)), "body/up", "branch")


def test_a_product_of_the_class_is_refused():
    class Own(nnx.Linear):
        def dot_general(self, *args, **kwargs):
            raise NotImplementedError

    with pytest.raises(UserError, match=r"^body/up cannot be adapted: Own defines its own dot_general"):
        check_call(nnx.eval_shape(lambda: Own.__new__(Own)), "body/up", "delta")


@pytest.mark.parametrize("slot", ["delta", "branch"])
@pytest.mark.parametrize("own", [0.5, nnx.Dict(a=nnx.Linear(1, 1, rngs=nnx.Rngs(0)))])
def test_a_layer_with_an_attribute_of_that_name_is_refused(slot, own):
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    setattr(layer, slot, own)
    with pytest.raises(UserError, match=rf"^body/up cannot be adapted: it has an attribute `{slot}`"):
        check_call(layer, "body/up", slot)
