import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft import SELECTIONS, UPDATES, AdapterParam, CirculantUpdate, LoRA, Update, make_update
from tests.peft.cases import EVERY, UPDATE_CASES, base, fresh, inputs, same_bits, update_parameters


def test_every_registered_update_has_a_case():
    assert UPDATE_CASES.keys() == UPDATES.keys()


@pytest.mark.parametrize("update", UPDATE_CASES)
def test_the_case_has_no_setting_at_its_default(update):
    instance = UPDATE_CASES[update].update
    assert type(instance) is UPDATES[update]
    for field in dataclasses.fields(instance):
        assert getattr(instance, field.name) != field.default, field.name


@pytest.mark.parametrize(("name", "update"), EVERY)
def test_a_fresh_update_changes_no_bit_of_the_output(name, update):
    model, _ = fresh(name, update)
    assert same_bits(model(inputs(name)), base(name)(inputs(name)))


@pytest.mark.parametrize(("name", "update"), EVERY)
def test_the_zero_factor_and_no_other_is_zero(name, update):
    for path, array in update_parameters(fresh(name, update)[0]).items():
        if path.rpartition("/")[2] in UPDATE_CASES[update].zero:
            assert not array.any(), path
        else:
            assert array.all(), path


@pytest.mark.parametrize("name", ["mlp", "bfloat16_kernels", "digits"])
@pytest.mark.parametrize("update", UPDATE_CASES)
def test_the_zero_factor_and_no_other_gets_a_gradient_at_the_start(name, update):
    graphdef, updates, frozen = nnx.split(fresh(name, update)[0], AdapterParam, ...)
    x = inputs(name)

    def loss(updates):
        y = nnx.merge(graphdef, updates, frozen)(x).astype(jnp.float32)
        return jnp.sum(jnp.sin(3 * y) * jnp.linspace(1, 2, y.size).reshape(y.shape))

    for path, gradient in nnx.to_flat_state(jax.jit(jax.grad(loss))(updates)):
        assert gradient[...].dtype == jnp.float32
        assert bool(jnp.any(gradient[...] != 0)) == (path[-1] in UPDATE_CASES[update].zero), path


@pytest.mark.parametrize("update", UPDATE_CASES)
def test_layers_start_at_different_random_numbers(update):
    arrays = [array.tobytes() for array in update_parameters(fresh("mlp", update)[0]).values() if array.any()]
    starts_at_zero = not any(
        array.any() for array in UPDATE_CASES[update].update.init(jax.random.key(0), (4, 4)).arrays().values()
    )
    assert len(set(arrays)) == len(arrays) >= (0 if starts_at_zero else 3)


@pytest.mark.parametrize(
    ("update", "name", "deviation"),
    [(CirculantUpdate(), "r2", 1.0), (CirculantUpdate(scale=0.02), "r2", 0.02), (LoRA(rank=8), "B", 768**-0.5)],
)
def test_the_random_factor_has_the_documented_deviation(update, name, deviation):
    array = update.init(jax.random.key(0), (768, 768)).arrays()[name]
    assert float(jnp.std(array)) == pytest.approx(deviation, rel=0.1)
    assert float(jnp.mean(array)) == pytest.approx(0, abs=0.1 * deviation)


@pytest.mark.parametrize(
    ("update", "factor"),
    [
        (CirculantUpdate(), 1.0),
        (CirculantUpdate(alpha=3.0, scale=0.1), 3.0),
        (LoRA(), 1.0),
        (LoRA(alpha=3.0, rank=4), 0.75),
    ],
)
def test_factor(update, factor):
    assert update.factor((768, 768)) == factor


def test_make_update_passes_settings_on():
    assert make_update("lora", {"rank": 4, "alpha": 8.0}) == LoRA(rank=4, alpha=8.0)
    assert make_update("circulant", {}) == CirculantUpdate()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("circulent", {}, r"no update is called 'circulent'; did you mean 'circulant'\? \(known: .*lora"),
        ("lora", {"rnak": 2}, r"lora has no setting 'rnak'; did you mean 'rank'\? \(known: alpha, rank\)"),
        ("circulant", {"rank": 2}, r"circulant has no setting 'rank'"),
        ("lora", {"rank": "2"}, r"lora\.rank must be a whole number, got '2'"),
        ("lora", {"rank": True}, r"lora\.rank must be a whole number, got True"),
        ("lora", {"rank": 1.5}, r"lora\.rank must be a whole number, got 1\.5"),
        ("circulant", {"scale": 0.0}, r"circulant\.scale must be finite and not 0, got 0\.0: it would never learn"),
        ("lora", {"alpha": 0}, r"lora\.alpha must be finite and not 0"),
        ("lora", {"alpha": float("nan")}, r"lora\.alpha must be finite and not 0, got nan"),
        ("circulant", {"alpha": None}, r"circulant\.alpha must be a number, got None"),
    ],
)
def test_make_update_names_what_is_wrong(name, settings, message):
    with pytest.raises(UserError, match=message):
        make_update(name, settings)


def test_a_subclass_registers_itself(monkeypatch):
    monkeypatch.setattr("surm_jax.peft.methods.base.UPDATES", registry := {})

    class Nothing(Update):
        name = "nothing"

        def init(self, key, shape):
            raise NotImplementedError

    assert registry == {"nothing": Nothing}


def test_selections_are_patterns_of_parameters():
    assert SELECTIONS["linear_probe"] == ()
    assert SELECTIONS["full"] == (".*",)


def test_a_name_is_taken_once():
    with pytest.raises(UserError, match="Mine needs a name of its own: 'circulant' is CirculantUpdate"):
        type("Mine", (CirculantUpdate,), {})
    assert UPDATES["circulant"] is CirculantUpdate
