"""Test adapters that train the head or other parameters of the base model, beside other adapters of the same model."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft import (
    CirculantUpdate,
    LoRA,
    Rule,
    adapt,
    adapter_names,
    adapter_of_examples,
    convert,
    delete,
    load_adapter,
    load_bank,
    merge,
    save_adapter,
    set_active,
    set_scale,
)
from surm_jax.peft.owners import owners
from tests.peft.models import relative_error, run, same_bits
from tests.peft.net import batch, net, tuned

HEAD = {"head/bias": "one", "head/kernel": "one"}


def head(name="one", model=None, seed=1):
    return tuned(model or net(), CirculantUpdate(), name=name, seed=seed, train=["head/.*"])


def test_a_second_adapter_that_trains_the_same_is_refused_with_both_names(tmp_path):
    outputs = []
    for seed, name in ((1, "one"), (2, "two")):
        model, adapter = head(name, seed=seed)
        save_adapter(tmp_path / name, model, adapter)
        outputs.append(run(model, batch(2)))
    one, _ = load_adapter(tmp_path / "one", net(), name="one")
    message = r"^the adapter 'two' trains head/bias, which the adapter 'one' of the model trains too: load each"
    for call in (lambda: head("two", one), lambda: load_adapter(tmp_path / "two", one, name="two")):
        with pytest.raises(UserError, match=message):
            call()
    with pytest.raises(UserError, match="has an adapter called 'one' already"):
        adapt(one, [], train=["norm/.*"], name="one", rngs=nnx.Rngs(0))
    # This is how to go on: a bank, or a replacement.
    with adapter_of_examples(jnp.array([1, 0])):
        served = load_bank([tmp_path / "one", tmp_path / "two"], net())(batch(2))
    assert relative_error(served, jnp.stack([outputs[1][0], outputs[0][1]])) < 1e-5
    two, _ = load_adapter(tmp_path / "two", delete(one, "one"), name="two")
    assert same_bits(run(two, batch(2)), outputs[1])


def test_what_a_switch_or_a_deletion_could_not_bring_back_is_refused():
    model, _ = head()
    assert owners(model) == HEAD
    with pytest.raises(UserError, match=r"^the adapter 'one' cannot be switched off: it also trained head/bias"):
        set_active(model, [])
    assert owners(set_active(model, ["one"])) == owners(set_scale(model, "one", 0.0)) == HEAD
    both, _ = tuned(model, LoRA(), name="two", seed=2)
    with pytest.raises(UserError, match=r"^the adapter 'one' cannot be deleted beside two: it also trained head/bias"):
        delete(both, "one")
    assert owners(delete(both, "two")) == HEAD
    assert owners(delete(model, "one")) == owners(merge(both)[0]) == {}
    probe, _ = adapt(net(), [], train=["head/.*"], name="probe", rngs=nnx.Rngs(0))
    assert adapter_names(probe) == ("probe",) and adapter_names(delete(probe, "probe")) == ()
    with pytest.raises(UserError, match=r"^the adapter 'probe' has no part that could be scaled$"):
        set_scale(probe, "probe", 0.5)


def test_a_converted_adapter_owns_what_the_old_one_trained(tmp_path):
    model, adapter = head()
    converted, recipe, _ = convert(model, adapter, LoRA(rank=6), name="low")
    assert owners(converted) == dict.fromkeys(HEAD, "low")
    save_adapter(tmp_path / "low", converted, recipe)
    assert same_bits(run(load_adapter(tmp_path / "low", net())[0], batch()), run(converted, batch()))


@pytest.mark.parametrize("order", list(itertools.permutations(["one", "two", "three"])))
def test_adapters_load_in_any_order_and_are_not_saved_with_what_others_trained(order, tmp_path):
    saved = {"one": head(), "two": tuned(net(), LoRA(), name="two", seed=2)}
    saved["three"] = tuned(net(), LoRA(rank=2), name="three", seed=3, train=["norm/.*"])
    model, adapters = net(), {}
    for name, (trained, adapter) in saved.items():
        save_adapter(tmp_path / name, trained, adapter)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in order:
        model, adapters[name] = load_adapter(tmp_path / name, model, name=name)
    assert same_bits(model.head.kernel[...], saved["one"][0].head.kernel[...])
    assert same_bits(model.norm.scale[...], saved["three"][0].norm.scale[...])
    for name in order:
        with pytest.raises(
            UserError, match=rf"no longer the one that got the adapter '{name}'.*trained by the adapter"
        ):
            save_adapter(tmp_path / name, model, adapters[name])
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_changed_base_is_not_saved(tmp_path):
    model, adapter = head()
    model.body[0].kernel[...] = model.body[0].kernel[...].at[1, 2].add(1e-6)
    with pytest.raises(UserError, match=r"^the base model is no longer .* 'one': other values in body/0/kernel\. Save"):
        save_adapter(tmp_path / "one", model, adapter)
    assert not (tmp_path / "one").exists()


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.lin, self.norm = nnx.Linear(8, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.drop(self.lin(x)))


def test_statistics_that_training_moved_are_saved(tmp_path):
    base, x = Normed(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (16, 8))
    for name in ("one", "two"):
        model, adapter = adapt(base, [Rule("lin", CirculantUpdate())], name=name, rngs=nnx.Rngs(1))
        if name == "one":  # The case without a move: nothing but the update is in the file.
            save_adapter(tmp_path / "still", model, adapter)
            assert owners(load_adapter(tmp_path / "still", base)[0]) == {}
        model(x)
        save_adapter(tmp_path / name, model, adapter)
        loaded, again = load_adapter(tmp_path / name, base, name=name)
        assert owners(loaded) == {"norm/mean": name, "norm/var": name}
        save_adapter(tmp_path / "again", loaded, again)
        for folder in (name, "again"):
            loaded, _ = load_adapter(tmp_path / folder, base, name=name)
            assert same_bits(
                nnx.view(loaded, deterministic=True, use_running_average=True)(x),
                nnx.view(model, deterministic=True, use_running_average=True)(x),
            )
    with pytest.raises(UserError, match=r"^the adapter 'one' trains norm/mean, which the adapter 'two'"):
        load_adapter(tmp_path / "one", loaded, name="one")
    with pytest.raises(UserError, match=r"norm/(mean|var) was trained, and only linear layers can be served together"):
        load_bank([tmp_path / "one", tmp_path / "still"], base)
    moved = nnx.clone(base)
    moved(x)
    with pytest.raises(
        UserError, match=r"not the one that .*still was trained on: other shapes or values in norm/mean"
    ):
        load_adapter(tmp_path / "still", moved)
