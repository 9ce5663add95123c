"""Check that every function of the package works with methods of users, which add no structured matrix."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.models import ViT, ViTConfig
from surm_jax.peft import (
    METHODS,
    DoRA,
    LoRA,
    Rule,
    StructuredUpdate,
    adapt,
    adapter_of_examples,
    combine,
    convert,
    delete,
    describe,
    iter_parts,
    load_adapter,
    load_bank,
    make_method,
    merge,
    save_adapter,
    save_peft,
    set_scale,
)
from surm_jax.training.parsing import base_config, parse
from surm_jax.training.setup import adapt_model
from tests.peft.models import (
    CONFIG,
    FAST_TO_COMPILE,
    TENSORS,
    adapter_arrays,
    parameters,
    part_arrays,
    relative_error,
    run,
    same_bits,
    trainable_paths,
)
from tests.peft.net import BODY, batch, expected, net, tuned
from tests.peft.oracles import weight_decomposed
from tests.training import tiny

SHAPES = {"body/0": (6, 8), "body/1": (8, 6)}


@pytest.fixture(autouse=True, scope="module")
def own():
    """Yield the module `own_method.py`, with its methods registered during the tests of this file."""
    module = importlib.import_module("tests.peft.own_method")
    METHODS.update(modulation=module.Modulation, gate=module.Gate)
    yield module
    del METHODS["modulation"], METHODS["gate"]


def kernel(path):
    return parameters(net())[f"{path}/kernel"].astype(np.float64)


def changes(model, name="default"):
    """Return the matrix that `Modulation` adds to each kernel, by NumPy and by the path of the layer."""
    found = {path: part_arrays(model, path, "delta", name) for path in SHAPES}
    return {path: kernel(path) * np.outer(found[path]["u"], found[path]["v"]) for path in SHAPES}


def gates(model, name="default"):
    """Return a NumPy function from a layer's output to what `Gate` adds, for each layer path."""
    found = {path: part_arrays(model, path, "branch", name)["g"] for path in SHAPES}
    return {path: functools.partial(np.multiply, np.tanh(g)) for path, g in found.items()}


def test_a_fresh_one_is_the_base_and_is_described():
    model, adapter = adapt(net(), [Rule(BODY, make_method("modulation", {}))], train=["head/.*"], rngs=nnx.Rngs(0))
    assert same_bits(run(model, batch()), run(net(), batch()))
    rows = describe(model, adapter).rows
    assert [(row.path, row.shape, row.kind, row.trainable) for row in rows[:2]] == [
        ("body/0", (6, 8), "ModulationPart", 14),
        ("body/1", (8, 6), "ModulationPart", 14),
    ]
    with pytest.raises(UserError, match=r"^modulation\.scale must be finite and not 0"):
        make_method("modulation", {"scale": 0.0})
    with pytest.raises(UserError, match="has parts, but only updates of kernels have parts"):
        Rule(BODY, make_method("modulation", {}), parts=2)


@pytest.mark.parametrize("name", ["modulation", "gate"])
def test_the_output_is_that_of_numpy_at_every_scale(name):
    model, _ = tuned(net(), make_method(name, {}), train=["head/.*"])
    added = {"changes": changes(model)} if name == "modulation" else {"branches": gates(model)}
    assert relative_error(run(model, batch()), expected(model, batch(), **added)) < 1e-5
    assert same_bits(run(set_scale(model, "default", 0.0), batch()), run(delete(model, "default"), batch()))
    if name == "modulation":
        half = {path: change / 2 for path, change in changes(model).items()}
        assert relative_error(run(set_scale(model, "default", 0.5), batch()), expected(model, batch(), half)) < 1e-5


def test_it_is_trained():
    model, adapter = adapt(
        net(), [Rule(BODY, make_method("modulation", {"dropout": 0.1}))], train=["head/.*"], rngs=nnx.Rngs(0)
    )
    graphdef, trainable, frozen = nnx.split(model, adapter.trainable, ...)
    optimizer, x, labels = optax.adam(2e-2), batch(), jnp.arange(8).reshape(4, 2) % 3

    @functools.partial(jax.jit, compiler_options=FAST_TO_COMPILE)
    def step(trainable, opt_state):
        def loss(trainable):
            logits = nnx.merge(graphdef, trainable, frozen)(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, slopes = jax.value_and_grad(loss)(trainable)
        with jax.numpy_dtype_promotion("standard"):  # Adam counts its steps as an integer.
            updates, opt_state = optimizer.update(slopes, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    opt_state, losses = optimizer.init(trainable), []
    for _ in range(6):
        trainable, opt_state, loss = step(trainable, opt_state)
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.95 * losses[0]
    after = nnx.merge(graphdef, trainable, frozen)
    before, now = ({**parameters(m), **adapter_arrays(m)} for m in (model, after))
    moved = {path for path in before if not same_bits(before[path], now[path])}
    assert (
        moved
        == trainable_paths(model, adapter)
        == {
            "head/kernel",
            "head/bias",
            *(f"{path}/delta/default/{array}" for path in SHAPES for array in "uv"),
        }
    )


@pytest.mark.parametrize("name", ["modulation", "gate"])
def test_files_hold_it_bit_for_bit(name, tmp_path):
    model, adapter = tuned(net(), make_method(name, {}), train=["head/.*"])
    save_adapter(tmp_path / "one", model, adapter)
    loaded, recipe = load_adapter(tmp_path / "one", net())
    assert recipe == adapter and same_bits(run(loaded, batch()), run(model, batch()))
    save_adapter(tmp_path / "two", loaded, recipe)
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in (CONFIG, TENSORS))


def test_merging():
    model, _ = tuned(net(), make_method("modulation", {}))
    merged, deviation = merge(model)
    assert nnx.graphdef(merged) == nnx.graphdef(net()) and deviation < 1e-6
    assert relative_error(run(merged, batch()), run(model, batch())) < 1e-5
    # The modulation depends on the kernel, so that no other adapter may be merged into this kernel alone.
    both, _ = tuned(model, LoRA(), name="other", seed=2)
    with pytest.raises(UserError, match="body/0 has a part of the adapter 'default' that depends on the kernel"):
        merge(both, ["other"])
    gated, _ = tuned(net(), make_method("gate", {}))
    with pytest.raises(UserError, match=r"body/0 has a part of the adapter 'default' that .* no kernel can hold it"):
        merge(gated)


def test_beside_dora_on_one_layer():
    model, _ = tuned(net(), make_method("modulation", {}))
    model, _ = tuned(model, DoRA(rank=2, alpha=3.0), name="dora", seed=2)
    model, _ = tuned(model, make_method("gate", {}), name="gated", seed=3)
    total = changes(model)
    for path in total:
        total[path] = total[path] + weight_decomposed(1.5, part_arrays(model, path, "delta", "dora"), kernel(path))
    assert relative_error(run(model, batch()), expected(net(), batch(), total, gates(model, "gated"))) < 1e-5
    merged, _ = merge(model, ["default", "dora"])
    assert {row.name for row in iter_parts(merged)} == {"gated"}
    assert relative_error(run(merged, batch()), run(model, batch())) < 1e-5


@pytest.mark.parametrize("name", ["modulation", "gate"])
def test_a_bank_serves_each_example_its_own(name, tmp_path):
    outputs, folders = [], []
    for number in range(3):
        # The last adapter also trained a kernel, which its modulation reads.
        train = ["head/.*", "body/1/kernel"] if number == 2 else ["head/.*"]
        method = make_method(name, {"dropout": 0.5} if name == "modulation" else {})
        model, adapter = tuned(net(), method, seed=number + 1, train=train, target=BODY if number else "body/0")
        folders.append(tmp_path / str(number))
        save_adapter(folders[-1], model, adapter)
        outputs.append(run(model, batch()))
    ids = (2, 0, 1, 2)
    bank = load_bank(folders, net())
    with adapter_of_examples(jnp.array(ids)):
        served = bank(batch())
    assert relative_error(served, jnp.stack([outputs[number][i] for i, number in enumerate(ids)])) < 1e-5
    kinds = {row.path: row.kind for row in describe(bank).rows}
    assert kinds["body/1"] == ("ModulationPart" if name == "modulation" else "GatePart")
    other, adapter = tuned(net(), LoRA() if name == "modulation" else make_method("circulant_adapter", {}))
    save_adapter(tmp_path / "other", other, adapter)
    with pytest.raises(UserError, match=r"other: body/0 has .*, but another adapter of the bank (Modulation|Gate)Part"):
        load_bank([folders[0], tmp_path / "other"], net())


def test_converting_from_it_and_not_to_it():
    model, adapter = tuned(net(), make_method("modulation", {}), train=["head/.*"])
    dense, recipe, errors = convert(model, adapter, StructuredUpdate(family="Dense"))
    assert max(errors.values()) < 1e-6 and recipe.train == ("head/.*",)
    assert relative_error(run(dense, batch()), run(model, batch())) < 1e-5
    with pytest.raises(UserError, match="body/0 cannot become modulation: ModulationPart has no method"):
        convert(dense, recipe, make_method("modulation", {}))
    with pytest.raises(UserError, match="body/0 cannot become modulation: ModulationPart has no method"):
        combine(model, {adapter: 0.5})
    gated, gate = tuned(net(), make_method("gate", {}))
    with pytest.raises(UserError, match=r"body/0 has a part of the adapter 'default' that .* no kernel can hold it"):
        convert(gated, gate, LoRA())
    with pytest.raises(UserError, match="the part of body/0 is ModulationPart, not a multiple of one matrix"):
        save_peft("nowhere", model, adapter, None)


def test_a_configuration_names_it():
    config = base_config()
    config.peft.method = "modulation"
    config.update_from_flattened_dict({"peft.modulation": {"scale": 0.5}})
    vit = ViTConfig(**tiny.GEOMETRY, num_classes=3)
    parsed = parse(config)
    model, adapter = adapt_model(nnx.eval_shape(lambda: ViT(vit, rngs=nnx.Rngs(0))), parsed.peft, 0)
    assert adapter.rules[0].method == make_method("modulation", {"scale": 0.5})
    assert {row.path.split("/")[-1] for row in iter_parts(model)} == {"query", "key", "value"}
    assert describe(model, adapter).rows[0].kind == "ModulationPart"
