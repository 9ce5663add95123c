import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.models import TARGETS
from surm_jax.peft import (
    ABBA,
    BottleneckBranch,
    CirculantBranch,
    CirculantUpdate,
    DoRA,
    HiRA,
    KroneckerUpdate,
    LearnableRank,
    LoRA,
    Rule,
    SMoA,
    StructuredUpdate,
    adapt,
    adapter_names,
    adapter_of_examples,
    delete,
    describe,
    load_adapter,
    load_bank,
    merge,
    save_adapter,
    set_active,
    set_scale,
)
from tests.peft import models
from tests.peft.models import FAST_TO_COMPILE, materialize, part_arrays, relative_error, run, same_bits
from tests.peft.net import BODY, batch, expected, net, tuned
from tests.peft.oracles import circulant, gelu, surm
from tests.speeds import fast


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_TO_COMPILE)
def _serve(graphdef, state, x, ids):
    with adapter_of_examples(ids):
        return nnx.merge(graphdef, state)(x)


def serve(bank, x, ids):
    """Return the output of a bank, given the adapter of each example. Banks of equal structure share one program."""
    graphdef, state = nnx.split(bank)
    return _serve(graphdef, state, x, jnp.asarray(ids))


def saved(folder, base, methods, **options):
    """Save one adapter for each method, all with different random values, and return their folders."""
    folders = []
    for number, method in enumerate(methods):
        model, adapter = tuned(base, method, seed=number + 1, **options)
        folders.append(folder / str(number))
        save_adapter(folders[-1], model, adapter)
    return folders


def alone(folders, base, x, ids):
    """Return the output of each example from a model with only this example's adapter."""
    every = [run(load_adapter(folder, base)[0], x) for folder in folders]
    outputs = jnp.stack([every[number][i] for i, number in enumerate(ids)])
    # Any two adapters must give different outputs, since otherwise a wrong choice would not be noticed.
    assert all(relative_error(a, b) > 0.01 for i, a in enumerate(every) for b in every[:i])
    return outputs


METHODS = {
    "circulant": CirculantUpdate(alpha=0.7, dropout=0.5),
    "lora": LoRA(rank=2, alpha=3.0),
    "learned_alpha": LoRA(rank=2, learn_alpha=True),
    "kronecker": KroneckerUpdate(alpha=0.8),
    "sum": StructuredUpdate(family="Toeplitz + LowRank", rank=2, alpha=0.5),
    "product": StructuredUpdate(family="LowRank @ Circulant", rank=2),
    "adapter": CirculantBranch(alpha=0.7, dropout=0.5),
    "waisted": BottleneckBranch(waist=3),
    "dora": DoRA(rank=2, alpha=3.0),
    "hira": HiRA(rank=2, alpha=3.0, dropout=0.5),
    "smoa": SMoA(rank=2, alpha=3.0),
    "lr_lora": LearnableRank(rank=2, alpha=1.0),
    "abba": ABBA(first_rank=2, rank=2),
}
IDS = (2, 0, 0, 1)


@pytest.mark.parametrize(
    "method",
    fast(METHODS, "circulant", "dora", "waisted"),
)
def test_each_example_gets_its_adapter_and_its_head(tmp_path, method):
    folders = saved(tmp_path, net(), [METHODS[method]] * 3, train=("head/.*",))
    bank = load_bank(folders, net())
    assert relative_error(serve(bank, batch(), IDS), alone(folders, net(), batch(), IDS)) < 1e-5
    assert adapter_names(net()) == ()


def test_against_numpy(tmp_path):
    folders, wanted = [], []
    for number in (0, 1):
        model, adapter = tuned(net(), CirculantUpdate(alpha=0.7), target="body/1", train=["head/.*"], seed=number)
        folders.append(tmp_path / str(number))
        save_adapter(folders[-1], model, adapter)
        a = part_arrays(model, "body/1", "delta")
        wanted.append(expected(model, batch(), {"body/1": 0.7 * circulant(a["r1"] * a["r2"], 8, 6)}))
    rows = np.stack([wanted[number][i] for i, number in enumerate((1, 0, 1, 1))])
    assert relative_error(serve(load_bank(folders, net()), batch(), (1, 0, 1, 1)), rows) < 1e-5


def test_branches_against_numpy(tmp_path):
    folders, wanted = [], []
    branch = surm(0.7, gelu, lambda a, m, n: circulant(a["r1"] * a["r2"], m, n))
    for number in (0, 1):
        model, adapter = tuned(net(), CirculantBranch(alpha=0.7), target="body/1", train=["head/.*"], seed=number)
        folders.append(tmp_path / str(number))
        save_adapter(folders[-1], model, adapter)
        a = part_arrays(model, "body/1", "branch")
        wanted.append(expected(model, batch(), branches={"body/1": functools.partial(branch, a)}))
    rows = np.stack([wanted[number][i] for i, number in enumerate((1, 0, 1, 1))])
    assert relative_error(serve(load_bank(folders, net()), batch(), (1, 0, 1, 1)), rows) < 1e-5


def test_a_layer_that_was_trained_and_updated(tmp_path):
    train = ("body/0/bias", "body/1/.*")
    folders = saved(tmp_path, net(), [CirculantUpdate(alpha=0.7)] * 3, train=train)
    bank = load_bank(folders, net())
    assert relative_error(serve(bank, batch(), IDS), alone(folders, net(), batch(), IDS)) < 1e-5
    # If only the bias was trained, the bank holds no dense kernel.
    assert not hasattr(bank.body[0].delta["bank"], "kernels") and hasattr(bank.body[1].delta["bank"], "kernels")


def test_a_kernel_that_only_one_adapter_trained_too(tmp_path):
    folders = saved(tmp_path, net(), [LoRA(rank=2)] * 2)
    for number, method in enumerate((LoRA(rank=2), DoRA(rank=2))):
        model, adapter = tuned(net(), method, seed=number + 5, train=["body/1/kernel"])
        folders.append(tmp_path / f"both_{number}")
        save_adapter(folders[-1], model, adapter)
    ids = (2, 0, 3, 1)
    bank = load_bank(folders, net())
    assert relative_error(serve(bank, batch(), ids), alone(folders, net(), batch(), ids)) < 1e-5


def test_adapters_of_other_kinds_than_one_another(tmp_path):
    folders = []
    for name, target, method, train in (
        ("a", "body/0", CirculantBranch(), ("body/1/bias",)),
        ("b", "body/1", DoRA(rank=2), ("body/1/.*", "head/bias")),
        ("c", BODY, CirculantBranch(), ("head/bias",)),
    ):
        model, adapter = tuned(net(), method, target=target, train=train, seed=len(folders) + 1)
        folders.append(tmp_path / name)
        save_adapter(folders[-1], model, adapter)
    bank = load_bank(folders, net())
    assert relative_error(serve(bank, batch(), IDS), alone(folders, net(), batch(), IDS)) < 1e-5


def test_adapters_of_other_layers_than_one_another(tmp_path):
    folders = []
    for name, target, train in (("a", "body/0", ()), ("b", "body/1", ("head/bias",)), ("c", BODY, ("head/.*",))):
        model, adapter = tuned(net(), CirculantUpdate(), target=target, train=train, seed=len(folders) + 1)
        folders.append(tmp_path / name)
        save_adapter(folders[-1], model, adapter)
    bank = load_bank(folders, net())
    assert relative_error(serve(bank, batch(), IDS), alone(folders, net(), batch(), IDS)) < 1e-5
    only = load_bank(folders[:1], net())
    assert type(only.body[1]) is nnx.Linear and type(only.head) is nnx.Linear


def test_a_vision_transformer(tmp_path):
    base, x = models.base("deep"), models.inputs("deep")
    folders = saved(tmp_path, base, [CirculantUpdate()] * 2, target=TARGETS["qv"], train=("head/.*",))
    bank = load_bank(folders, base)
    assert relative_error(serve(bank, x, (1, 0)), alone(folders, base, x, (1, 0))) < 1e-5


def test_kernels_of_higher_rank_and_parts(tmp_path):
    class Heads(nnx.Module):
        def __init__(self, rngs):
            self.split = nnx.LinearGeneral(6, (3, 4), rngs=rngs)
            self.join = nnx.LinearGeneral((3, 4), 6, axis=(-2, -1), rngs=rngs)

        def __call__(self, x):
            return self.join(jnp.tanh(self.split(x)))

    base = materialize(lambda: Heads(nnx.Rngs(0)))
    folders = saved(tmp_path, base, [CirculantUpdate()] * 3, target="split", parts=3, which=(0, 2), train=("join/.*",))
    bank = load_bank(folders, base)
    assert relative_error(serve(bank, batch(), IDS), alone(folders, base, batch(), IDS)) < 1e-5


def test_a_base_in_bfloat16(tmp_path):
    base, x = net("bfloat16"), batch(dtype="bfloat16")
    folders = saved(tmp_path, base, [CirculantUpdate()] * 3, train=("head/.*",))
    bank = load_bank(folders, base)
    output = serve(bank, x, IDS)
    assert output.dtype == jnp.bfloat16 and bank.body[0].delta["bank"].parts.first().c[...].dtype == jnp.float32
    assert relative_error(output, alone(folders, base, x, IDS)) < 2.0**-6


def test_one_program_serves_all_batches(tmp_path):
    folders = saved(tmp_path, net(), [CirculantUpdate()] * 3)
    graphdef, state = nnx.split(load_bank(folders, net()))
    traces = []

    @functools.partial(jax.jit, compiler_options=FAST_TO_COMPILE)
    def forward(state, x, ids):
        traces.append(None)
        with adapter_of_examples(ids):
            return nnx.merge(graphdef, state)(x)

    for ids in (IDS, (0, 1, 2, 0), (1, 1, 1, 1)):
        output = forward(state, batch(), jnp.array(ids))
        assert relative_error(output, alone(folders, net(), batch(), ids)) < 1e-5
    # A compiled function cannot check the ids. An example with a wrong id gets NaN, and no other example does.
    wrong = forward(state, batch(), jnp.array((0, 3, -1, 1)))
    assert np.isnan(wrong[1:3]).all() and relative_error(wrong[0], output[0]) > 0.01
    assert relative_error(wrong[3], output[3]) < 1e-6
    assert len(traces) == 1


def test_a_bank_of_branches_is_switched_described_and_deleted_as_an_adapter(tmp_path):
    bank = load_bank(saved(tmp_path, net(), [BottleneckBranch(waist=3)] * 3, target="body/1"), net())
    base = run(net(), batch())
    assert same_bits(serve(set_active(bank, []), batch(), IDS), base)
    assert [(row.path, row.shape, row.kind, row.trainable) for row in describe(bank).rows] == [
        ("body/1", (6, 6), "Dense", 0)
    ]
    # Only the examples whose ids belong to no adapter get NaN.
    wrong = serve(bank, batch(), (0, 3, -1, 1))
    assert np.isnan(wrong[1:3]).all() and np.isfinite(wrong[0]).all() and np.isfinite(wrong[3]).all()
    bare = delete(bank, "bank")
    assert nnx.graphdef(bare) == nnx.graphdef(net()) and same_bits(run(bare, batch()), base)
    with pytest.raises(UserError, match=r"^body/1 has a part of the adapter 'bank' that is added to the output"):
        merge(bank)


def test_a_bank_is_switched_described_and_deleted_as_an_adapter(tmp_path):
    bank = load_bank(saved(tmp_path, net(), [CirculantUpdate()] * 3, train=("head/.*",)), net())
    assert adapter_names(bank) == ("bank",)
    base = run(net(), batch())
    for off in (set_active(bank, []), set_scale(bank, "bank", 0.0)):
        assert same_bits(serve(off, batch(), IDS), base)
    rows = {row.path: (row.shape, row.kind, row.trainable) for row in describe(bank).rows}
    assert rows == {
        "body/0": ((6, 8), "Circulant", 0),
        "body/1": ((8, 6), "Circulant", 0),
        "head": ((6, 3), "Dense", 0),
    }
    bare = delete(bank, "bank")
    assert nnx.graphdef(bare) == nnx.graphdef(net()) and same_bits(run(bare, batch()), base)
    with pytest.raises(UserError, match="'bank' that is a bank, in which each example has another update"):
        merge(bank)


def test_half_a_bank_adds_half_of_each(tmp_path):
    layer = nnx.Linear(6, 8, rngs=nnx.Rngs(0))
    folders = saved(tmp_path, layer, [CirculantUpdate()] * 3, target="")
    bank, x = load_bank(folders, layer), batch()
    whole, half = serve(bank, x, IDS) - layer(x), serve(set_scale(bank, "bank", 0.5), x, IDS) - layer(x)
    assert relative_error(half, whole / 2) < 1e-5


def test_a_call_that_does_not_say_which_adapters_is_refused(tmp_path):
    layer = nnx.Linear(6, 8, rngs=nnx.Rngs(0))
    bank = load_bank(saved(tmp_path, layer, [CirculantUpdate()] * 2, target=""), layer)
    with pytest.raises(
        UserError, match=r"^no adapters were chosen: call the model within `with surm_jax\.adapter_of_examples"
    ):
        bank(batch())
    refused = {
        (0, 1): r"^adapter_of_examples has ids of shape \(2,\) for a batch of shape \(4, 2\)$",
        ((0,), (1,), (0,), (1,)): r"ids of shape \(4, 1\) for a batch of shape \(4, 2\)$",
        (0.0, 1.0, 0.0, 1.0): "needs whole numbers, the indices of adapters, got float32$",
        (0, 1, 2, 0): "^adapter_of_examples has ids from 0 to 2, but the bank 0 to 1$",
        (0, 1, -1, 0): "^adapter_of_examples has ids from -1 to 1, but the bank 0 to 1$",
    }
    for ids, message in refused.items():
        with pytest.raises(UserError, match=message), adapter_of_examples(jnp.array(ids)):
            bank(batch())
    with adapter_of_examples([0, 1, 1, 0]):
        listed = bank(batch())
    assert relative_error(listed, serve(bank, batch(), (0, 1, 1, 0))) < 1e-6


def test_folders_that_cannot_be_served_together_are_refused(tmp_path):
    def folder(name, method, **options):
        model, adapter = tuned(net(), method, **options)
        save_adapter(tmp_path / name, model, adapter)
        return tmp_path / name

    good = folder("good", LoRA(rank=2))
    refused = {
        folder(
            "rank", LoRA(rank=3)
        ): r"rank: body/0 has LowRank\(down=float32\[6,3\], .* but another adapter .*\[6,2\]",
        folder("family", CirculantUpdate()): r"family: body/0 has Circulant\(.* but another adapter .* LowRank\(",
        folder("norm", LoRA(rank=2), train=["norm/.*"]): "norm: norm/(bias|scale) was trained, and only linear layers",
        tmp_path / "absent": "^no adapter in .*absent",
    }
    for bad, message in refused.items():
        with pytest.raises(UserError, match=message):
            load_bank([good, bad], net())
    branch = folder("branch", CirculantBranch())
    for bad in (folder("waist", BottleneckBranch()), folder("alpha", CirculantBranch(alpha=0.5))):
        with pytest.raises(UserError, match=rf"{bad.name}: body/0 has a branch of .* but another .* a branch of Circ"):
            load_bank([branch, bad], net())
    with pytest.raises(UserError, match=r"^load_bank needs at least one adapter folder"):
        load_bank([], net())
    with pytest.raises(UserError, match=r"^folders must be a list, got one: write \['.*good'\]"):
        load_bank(good, net())
    other = materialize(lambda: type(net())(jnp.float32, nnx.Rngs(0)))
    other.body[0].bias[...] = other.body[0].bias[...] + 1
    with pytest.raises(UserError, match=r"the base model is not the one that .*good was trained on: .*body/0/bias"):
        load_bank([good], other)


def test_the_base_is_read_once_for_all_adapters(tmp_path, monkeypatch):
    base, hashed = net(), []
    folders = saved(tmp_path, base, [LoRA(), LoRA(), LoRA()], train=["head/bias"])
    module = importlib.import_module("surm_jax.peft.fingerprint")
    whole = module.whole_on_host
    monkeypatch.setattr(module, "whole_on_host", lambda array: hashed.append(array) or whole(array))
    load_bank(folders, base)
    assert len(hashed) == len(jax.tree.leaves(nnx.state(base, nnx.Param)))


def test_a_base_with_adapters_is_refused(tmp_path):
    folders = saved(tmp_path, net(), [CirculantUpdate()])
    adapted, _ = tuned(net(), LoRA(), target="head", name="mine")
    for model, name in ((adapted, "mine"), (load_bank(folders, net()), "bank")):
        with pytest.raises(UserError, match=rf"^a bank needs a base model without adapters, and this one has {name}$"):
            load_bank(folders, model)


def test_it_works_in_tree_mode(tmp_path):
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        folders = saved(tmp_path, net(), [CirculantUpdate(), CirculantUpdate(), CirculantBranch()])
        with adapter_of_examples(jnp.array(IDS)):
            output = load_bank(folders, net())(batch())
        assert relative_error(output, alone(folders, net(), batch(), IDS)) < 1e-5


class CosineHead(nnx.Linear):
    """A linear layer whose `__call__` does not call that of `nnx.Linear`."""

    def __call__(self, x):
        return x @ (self.kernel[...] / jnp.linalg.norm(self.kernel[...], axis=0))


def test_a_trained_layer_with_a_call_of_its_own_is_refused(tmp_path):
    base = nnx.Dict(body=nnx.Linear(4, 4, rngs=nnx.Rngs(0)), head=CosineHead(4, 2, rngs=nnx.Rngs(1)))
    model, adapter = adapt(base, [Rule("body", LoRA())], train=["head/.*"], rngs=nnx.Rngs(2))
    save_adapter(tmp_path / "one", model, adapter)
    with pytest.raises(UserError, match=r"head cannot be adapted: .*__call__"):
        load_bank([tmp_path / "one"], base)
