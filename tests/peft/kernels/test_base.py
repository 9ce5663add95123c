import jax
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft import CirculantUpdate, LoRA, Rule, adapt
from surm_jax.peft.kernels import check_product, check_slots, kernel_of, kind_of
from tests.peft.models import Gated


class ReadsKernel(nnx.Linear):
    def __call__(self, x):
        return x @ self.kernel[...]


class WithoutBias(ReadsKernel):
    """A subclass that does not define `__call__`. It inherits one that does not call `super().__call__`."""


class InfersShape(Gated):
    """A subclass that does not define `__call__`. It inherits one that calls `super().__call__`."""


def stacked(make):
    return nnx.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 3))


@pytest.mark.parametrize(
    ("make", "has_kernel"),
    [
        (lambda rngs: nnx.Linear(2, 3, rngs=rngs), True),
        (lambda rngs: nnx.LinearGeneral(2, (3, 4), rngs=rngs), True),
        (lambda rngs: nnx.Einsum("ab,bc->ac", (2, 3), rngs=rngs), True),
        (lambda rngs: Gated(2, 3, rngs=rngs), True),
        (lambda rngs: nnx.LayerNorm(2, rngs=rngs), False),
    ],
)
def test_the_kind_of_a_module_is_that_of_its_class(make, has_kernel):
    assert (kind_of(nnx.eval_shape(lambda: make(nnx.Rngs(0)))) is not None) is has_kernel


@pytest.mark.parametrize("cls", [nnx.Linear, Gated, InfersShape, nnx.LoRALinear])
def test_a_call_through_super_is_accepted(cls):
    options = {"lora_rank": 1} if cls is nnx.LoRALinear else {}
    check_product(cls(2, 3, rngs=nnx.Rngs(0), **options), "layer")


@pytest.mark.parametrize("cls", [ReadsKernel, WithoutBias])
def test_a_call_past_super_is_refused(cls):
    message = r"^body/up cannot be adapted: ReadsKernel\.__call__ does not call super.*body/up/kernel$"
    with pytest.raises(UserError, match=message):
        check_product(cls(2, 3, rngs=nnx.Rngs(0)), "body/up")


def test_a_product_of_the_class_is_refused():
    class Own(nnx.Linear):
        def dot_general(self, *args, **kwargs):
            raise NotImplementedError

    with pytest.raises(UserError, match=r"^body/up cannot be adapted: Own defines its own dot_general"):
        check_product(nnx.eval_shape(lambda: _made(Own)), "body/up")


def _made(cls):
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    object.__setattr__(layer, "__class__", cls)
    return layer


@pytest.mark.parametrize("slot", ["delta", "branch"])
@pytest.mark.parametrize("own", [0.5, nnx.Dict(a=nnx.Linear(1, 1, rngs=nnx.Rngs(0)))])
def test_a_layer_with_an_attribute_of_that_name_is_refused(slot, own):
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    setattr(layer, slot, own)
    with pytest.raises(UserError, match=rf"^body/up cannot be adapted: it has an attribute `{slot}`"):
        check_slots(layer, "body/up")


def test_a_kernel_of_another_shape_is_refused():
    layer = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
    layer.kernel = nnx.Param(jax.numpy.zeros((4, 3, 5)))
    with pytest.raises(UserError, match=r"^blocks/up cannot be adapted: .*\(4, 3, 5\), but one layer has \(4, 5\)"):
        kernel_of(layer, "blocks/up").matrices()


def test_a_stack_of_layers_has_one_matrix_for_each():
    kernel = kernel_of(nnx.eval_shape(lambda: stacked(lambda rngs: nnx.LinearGeneral(4, (5, 2), rngs=rngs))), "up")
    assert kernel.stack == (3,) and kernel.matrices().shape == (3, 4, 10)


def test_layers_of_a_stack_start_as_separate_layers_do():
    layers = stacked(lambda rngs: nnx.Linear(6, 6, rngs=rngs))
    for method in (LoRA(rank=2), CirculantUpdate()):
        model, _ = adapt(layers, [Rule("", method)], rngs=nnx.Rngs(1))
        for variable in model.delta["default"].tensors().values():
            array = variable[...]
            assert array.shape[0] == 3
            if array.any():
                assert len({row.tobytes() for row in jax.device_get(array)}) == 3
