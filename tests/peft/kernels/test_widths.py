import jax.numpy as jnp
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft import BottleneckBranch, Rule, adapt, describe, load_adapter, save_adapter
from surm_jax.peft.kernels.widths import module_stack, output_width
from tests.peft.kernels.kinds import scanned, stack
from tests.peft.models import perturb, relative_error, same_bits


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


@pytest.mark.parametrize(
    ("make", "width"),
    [
        (lambda rngs: nnx.Einsum("btnh,nhd->btd", (2, 3, 4), rngs=rngs), 4),
        (lambda rngs: nnx.Conv(2, 5, (3, 3), rngs=rngs), 5),
        (lambda rngs: nnx.ConvTranspose(2, 5, (3, 3), rngs=rngs), 5),
        (lambda rngs: nnx.Embed(7, 5, rngs=rngs), 5),
        (Block, 4),
        (stack(Block, 3), 4),
    ],
)
def test_widths(make, width):
    module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    assert output_width(module, "layer") == width


@pytest.mark.parametrize(
    ("equation", "kernel", "message"),
    [("btd,dnh->btnh", (4, 2, 3), r"has several feature axes \(2, 3\)"), ("btd,dn->bnt", (4, 2), "does not end with")],
)
def test_an_einsum_that_does_not_end_with_one_feature_axis(equation, kernel, message):
    with pytest.raises(UserError, match=f"its output {message}"):
        output_width(nnx.Einsum(equation, kernel, rngs=nnx.Rngs(0)), "layer")


def test_layers_that_are_stacked_in_different_ways():
    module = nnx.Dict(
        one=nnx.Linear(4, 4, rngs=nnx.Rngs(0)), many=stack(lambda rngs: nnx.Linear(4, 4, rngs=rngs), 3)(nnx.Rngs(1))
    )
    with pytest.raises(UserError, match="its layers are stacked in different ways"):
        module_stack(module, "layer")


def test_a_branch_of_a_stack_of_layers(tmp_path):
    x = jnp.linspace(-1, 1, 8).reshape(2, 4)
    blocks = stack(Block, 3)(nnx.Rngs(0))
    model, adapter = adapt(blocks, [Rule("", BottleneckBranch(waist=2))], rngs=nnx.Rngs(1))
    assert relative_error(scanned(model, x), scanned(blocks, x)) < 1e-6
    assert describe(model, adapter).trainable == 3 * (4 * 2 + 2 + 2 * 4 + 4)
    model = perturb(model, adapter)
    assert relative_error(scanned(model, x), scanned(blocks, x)) > 1e-3
    save_adapter(tmp_path / "adapter", model, adapter)
    assert same_bits(scanned(load_adapter(tmp_path / "adapter", blocks)[0], x), scanned(model, x))
