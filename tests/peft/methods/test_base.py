import dataclasses

import jax
import jax.numpy as jnp
import pytest

from surm_jax import peft
from surm_jax.errors import UserError
from surm_jax.peft import METHODS, CirculantUpdate, LoRA, Update, make_method


@pytest.mark.parametrize(
    ("method", "name", "deviation"),
    [
        (CirculantUpdate(), "r2", 1.0),
        (CirculantUpdate(scale=0.02), "r2", 0.02),
        (LoRA(rank=8), "down", 768**-0.5),
        (peft.ToeplitzUpdate(), "t2", 0.02),
        (peft.AsymmetricToeplitzUpdate(), "t2", 0.02),
        (peft.LowDisplacementUpdate(rank=4), "H", 0.02),
        # Kaiming-uniform values lie between -1 / sqrt(rows) and 1 / sqrt(rows).
        (peft.KroneckerUpdate(), "B", (3 * 24) ** -0.5),
        (peft.KroneckerUpdate(scale=0.5), "B", 0.5 * (3 * 24) ** -0.5),
        (peft.LoKr(rank=16), "B", (3 * 32) ** -0.5),
        (peft.LoKr(rank=8), "down", (3 * 32) ** -0.5),
        (peft.LoKr(rank=8), "up", (3 * 8) ** -0.5),
        (peft.KAdaptation(scale=0.3), "down", 0.3),
    ],
)
def test_the_random_factor_has_the_documented_deviation(method, name, deviation):
    array = method.init(jax.random.key(0), (768, 768)).arrays()[name]
    assert float(jnp.std(array)) == pytest.approx(deviation, rel=0.1)
    assert float(jnp.mean(array)) == pytest.approx(0, abs=0.15 * deviation)


@pytest.mark.parametrize(
    ("method", "deviation"),
    [(peft.BottleneckBranch(scale=0.05), 0.05), (peft.Compacter(scale=0.05), 0.05)],
)
def test_the_matrix_into_the_waist_has_the_documented_deviation(method, deviation):
    down, up = method.init_branch(jax.random.key(0), 768)
    assert float(jnp.std(down.to_dense())) == pytest.approx(deviation, rel=0.3)
    assert not up.to_dense().any()


@pytest.mark.parametrize(
    ("method", "factor"),
    [
        (CirculantUpdate(), 1.0),
        (CirculantUpdate(alpha=3.0, scale=0.1), 3.0),
        (LoRA(), 1.0),
        (LoRA(alpha=3.0, rank=4), 0.75),
        (peft.RankStabilizedLoRA(alpha=3.0, rank=4), 1.5),
        (peft.C3A(alpha=2.0), 2 / 768),
        (peft.LoKr(alpha=2.0, rank=4), 0.5),
    ],
)
def test_factor(method, factor):
    assert method.factor((768, 512)) == pytest.approx(factor)


def test_make_method_passes_settings_on():
    assert make_method("lora", {"rank": 4, "alpha": 8.0}) == LoRA(rank=4, alpha=8.0)
    assert make_method("circulant", {}) == CirculantUpdate()
    assert make_method("lora", {"alpha": 2}).alpha == 2
    assert make_method("lora", {"learn_alpha": True, "alpha": 0.0}).learn_alpha
    assert make_method("bottleneck", {"activation": "relu", "bias": False}).activation == "relu"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("circulent", {}, r"no method is called 'circulent'; did you mean 'circulant'.*known: .*lora"),
        ("lora", {"ranks": 2}, r"lora has no setting 'ranks'; did you mean 'rank'\?"),
        ("lora", {"rank": "2"}, r"lora\.rank must be a whole number, got '2'"),
        ("lora", {"rank": True}, r"lora\.rank must be a whole number, got True"),
        ("lora", {"rank": 1.5}, r"lora\.rank must be a whole number, got 1\.5"),
        ("lora", {"learn_alpha": 1}, r"lora\.learn_alpha must be True or False, got 1"),
        ("lora", {"dropout": 1.0}, r"lora\.dropout must be at least 0 and below 1, got 1\.0"),
        ("lora", {"dropout": -0.1}, r"lora\.dropout must be at least 0 and below 1"),
        ("circulant", {"scale": 0.0}, r"circulant\.scale must be finite and not 0, got 0\.0: it would never learn"),
        ("lora", {"alpha": 0}, r"lora\.alpha must be finite and not 0"),
        ("lora", {"alpha": float("nan")}, r"lora\.alpha must be finite and not 0, got nan"),
        ("circulant", {"alpha": None}, r"circulant\.alpha must be a number, got None"),
        ("bottleneck", {"waist": -3}, r"bottleneck\.waist must be at least 1, got -3"),
        ("kadaptation", {"terms": 0}, r"kadaptation\.terms must be at least 1, got 0"),
        ("c3a", {"block": -1}, r"c3a\.block must be at least 0, got -1"),
        ("bottleneck", {"activation": "gleu"}, r"bottleneck\.activation must be one of .* 'gleu'; did you mean 'gelu'"),
        ("structured", {"family": "Toeplits"}, r"structured\.family: no family is called 'Toeplits'; did you mean"),
        ("structured_adapter", {"family": "Circulant +"}, r"structured_adapter\.family: no family is called ''"),
    ],
)  # fmt: skip
def test_make_method_names_what_is_wrong(name, settings, message):
    with pytest.raises(UserError, match=message):
        make_method(name, settings)


def test_a_subclass_registers_itself(monkeypatch):
    monkeypatch.setattr("surm_jax.peft.methods.base.METHODS", registry := {})

    class Nothing(Update):
        name = "nothing"

        def init(self, key, shape):
            raise NotImplementedError

    assert registry == {"nothing": Nothing}


def test_a_name_is_taken_once():
    with pytest.raises(UserError, match="Mine needs a name of its own: 'circulant' is CirculantUpdate"):
        type("Mine", (CirculantUpdate,), {})
    with pytest.raises(UserError, match="Mine needs a name of its own: 'lora' is LoRA"):
        type("Mine", (CirculantUpdate,), {"name": "lora"})
    assert METHODS["circulant"] is CirculantUpdate


def test_every_method_has_a_docstring_of_its_own_and_settings_with_defaults():
    for method in METHODS.values():
        assert not method.__doc__.startswith(f"{method.__name__}(")
        assert all(field.default is not dataclasses.MISSING for field in dataclasses.fields(method))


@pytest.mark.parametrize(
    ("size", "divisor", "factors"),
    [(256, 0, (16, 16)), (128, 0, (8, 16)), (127, 0, (1, 127)), (128, 4, (4, 32)), (768, 10, (8, 96)), (12, 9, (3, 4))],
)
def test_balanced_factors_are_those_of_peft(size, divisor, factors):
    from surm_jax.peft.methods.matrices.hypercomplex import balanced_factors

    assert balanced_factors(size, divisor) == factors
    layer = pytest.importorskip("peft.tuners.lokr.layer", reason="compares with peft: requirements-peers.txt")
    assert layer.factorization(size, divisor or -1) == factors


@pytest.mark.parametrize(
    "settings", [{"rank": -1}, {"rank": 2.5}, {"rank": "4"}, {"learn_alpha": "False"}, {"alpha": "1"}]
)
def test_settings_are_checked_in_python_too(settings):
    with pytest.raises(UserError, match=rf"lora\.{next(iter(settings))} must be "):
        LoRA(**settings)
