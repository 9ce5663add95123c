import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft import (
    BottleneckBranch,
    CirculantUpdate,
    DoRA,
    LoRA,
    Rule,
    adapt,
    check,
    iter_parts,
    merge,
)
from tests.peft.cases import UPDATES
from tests.peft.kernels.kinds import KINDS
from tests.peft.models import MODELS, TOLERANCES, base, inputs, perturb, relative_error


class Reads(nnx.Module):
    """A model that calls a layer and also reads its kernel, as a head tied to the embeddings does."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(6, 4, rngs=rngs)
        self.up = nnx.Linear(4, 4, rngs=rngs)
        self.stopped = nnx.Linear(4, 4, rngs=rngs)
        self.unused = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, ids):
        x = self.up(self.embed(ids))
        x = x + jax.lax.stop_gradient(self.stopped(x))
        self.unused(x)
        return x @ self.embed.embedding[...].T


class Shared(nnx.Module):
    """A model with two layers that share a variable."""

    def __init__(self, rngs):
        self.q, self.k = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
        self.k.kernel = self.q.kernel

    def __call__(self, x):
        return self.q(x) * self.k(x)


def reads(target, method, **options):
    return adapt(Reads(nnx.Rngs(0)), [Rule(target, method)], rngs=nnx.Rngs(1), **options)


IDS = jnp.array([[0, 3, 5]])


@pytest.mark.parametrize("abstract", [False, True])
@pytest.mark.parametrize(
    ("target", "method", "message"),
    [
        ("unused", LoRA(), "^the part of unused does not reach the output"),
        ("up|stopped", CirculantUpdate(), "^the part of stopped does not reach the output"),
        ("unused", BottleneckBranch(waist=2), "^the part of unused does not reach the output"),
        ("embed", LoRA(), "^the model reads the kernel of embed in another place too, .*embed/embedding in the rule"),
        ("embed", DoRA(), "^the model reads the kernel of embed in another place too"),
    ],
)
def test_what_does_not_act_is_named(target, method, message, abstract):
    example = jax.ShapeDtypeStruct(IDS.shape, IDS.dtype) if abstract else (IDS,)
    with pytest.raises(UserError, match=message):
        reads(target, method, example=example)
    check(*reads("up", method if method.part.slot == "delta" else LoRA()), example)


def test_a_parameter_named_in_the_rule_has_all_its_readers():
    model, adapter = reads("embed/embedding", LoRA(), example=IDS)
    model = perturb(model, adapter)
    merged, _ = merge(model, example=IDS)
    assert relative_error(merged(IDS), model(IDS)) <= TOLERANCES["float32"]


def test_a_merged_model_that_computes_something_else_is_refused():
    model, adapter = reads("embed", LoRA())
    with pytest.raises(UserError, match="the merged model computes something else"):
        merge(perturb(model, adapter), example=IDS)
    merge(perturb(*reads("up", LoRA())), example=(IDS,))


def test_a_shared_variable_is_merged_for_the_adapted_layer():
    x = jnp.linspace(-1, 1, 8).reshape(2, 4)
    model, adapter = adapt(Shared(nnx.Rngs(0)), [Rule("q", LoRA())], example=x, rngs=nnx.Rngs(1))
    merge(perturb(model, adapter), example=x)


@pytest.mark.parametrize("kind", [k if k in ("stacked_einsum", "embed_tied") else
                                  pytest.param(k, marks=pytest.mark.exhaustive) for k in KINDS])  # fmt: skip
def test_every_kind_passes_the_check(kind):
    case = KINDS[kind]

    class Caller(nnx.Module):
        def __init__(self):
            self.layer = case.module()

        def __call__(self, x):
            return case.call(self.layer, x)

    rule = Rule(f"layer/{case.target}".rstrip("/"), DoRA(), axes=case.axes)
    model, adapter = adapt(Caller(), [rule], example=case.x(), rngs=nnx.Rngs(1))
    merge(perturb(model, adapter), example=case.x())


@pytest.mark.parametrize("name", ["mlp", "attention", "bert"])
def test_models_pass_the_check(name):
    check(*adapt(base(name), [Rule(MODELS[name].target, UPDATES["circulant"].method)], rngs=nnx.Rngs(1)), inputs(name))


@pytest.mark.parametrize(
    ("wrap", "method"),
    [(nnx.WeightNorm, LoRA()), (nnx.SpectralNorm, LoRA()), (nnx.SpectralNorm, BottleneckBranch(waist=2))],
)
def test_layers_whose_kernel_a_module_normalises_are_refused(wrap, method):
    model = nnx.Dict(body=wrap(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1)))
    with pytest.raises(UserError, match=f"^body/layer_instance cannot be adapted: {wrap.__name__} overwrites"):
        adapt(model, [Rule("body/layer_instance", method)], rngs=nnx.Rngs(2))


def test_a_module_has_updates_in_one_place():
    layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    rules = [Rule("layer", LoRA()), Rule("layer/kernel", LoRA())]
    with pytest.raises(UserError, match="an update at its product and one at a parameter"):
        adapt(nnx.Dict(layer=layer), rules, rngs=nnx.Rngs(1))
    for first, second in (rules, rules[::-1]):
        model, _ = adapt(nnx.Dict(layer=layer), [first], rngs=nnx.Rngs(1))
        assert len(list(iter_parts(model))) == 1
        with pytest.raises(UserError, match="an update at its product and one at a parameter"):
            adapt(model, [second], name="second", rngs=nnx.Rngs(2))
