"""Tests of `only`, with an optimiser that selects what it trains by its type, and with google-tunix.

The tests with google-tunix are skipped if it is not installed. It needs an environment of its own, since it wants an
older safetensors than transformers: pip install google-tunix==0.1.7 -r requirements.txt -r requirements-test.txt
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft import (
    BottleneckBranch,
    CirculantUpdate,
    LoRA,
    Rule,
    adapt,
    load_adapter,
    merge,
    only,
    register_kernel,
    save_adapter,
)  # fmt: skip
from surm_jax.peft.kernels import KINDS
from tests.peft.models import perturb, relative_error, same_bits


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.LoRALinear(6, 6, lora_rank=1, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)
        self.head = nnx.Linear(6, 2, rngs=rngs)
        self.tied = self.head

    def __call__(self, x):
        return self.head(jnp.tanh(self.second(jnp.tanh(self.first(x)))))


def arrays(model):
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def numbers(state):
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def test_an_optimiser_by_type_trains_what_the_adapter_trains(tmp_path):
    x, base = jax.random.normal(jax.random.key(0), (5, 6)), Model(nnx.Rngs(0))
    first, _ = adapt(base, [Rule("second", LoRA(rank=2))], name="other", rngs=nnx.Rngs(1))
    rules = [Rule("first", CirculantUpdate()), Rule("second", BottleneckBranch(waist=2))]
    both, adapter = adapt(first, rules, train=["head/.*"], rngs=nnx.Rngs(2))
    both = perturb(both, adapter)
    model = only(both, adapter)
    assert same_bits(model(x), both(x)) and model.tied is model.head
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
    gradient = nnx.grad(lambda model: jnp.mean(model(x) ** 2), argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    with jax.numpy_dtype_promotion("standard"):  # Adam counts its steps as an integer.
        optimizer.update(model, gradient)
    trained = numbers(nnx.state(both, adapter.trainable))
    assert (
        numbers(nnx.state(optimizer, nnx.optimizer.OptState)) == 2 * trained + 2
    )  # Adam and the optimiser count their steps.
    before, after = arrays(both), arrays(model)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {path for path, _ in nnx.to_flat_state(nnx.state(both, adapter.trainable))}
    save_adapter(tmp_path / "adapter", model, adapter)
    loaded, _ = load_adapter(tmp_path / "adapter", first)
    assert same_bits(loaded(x), model(x))
    assert relative_error(merge(adapt(loaded, [], name="none", rngs=nnx.Rngs(0))[0], ["other"])[0](x), model(x)) < 1e-5


def test_a_second_lora_that_was_trained_too_is_refused(tmp_path):
    base = Model(nnx.Rngs(0))
    model, adapter = adapt(base, [Rule("second", LoRA(rank=2))], rngs=nnx.Rngs(1))
    model.first.lora.lora_a[...] += 1
    with pytest.raises(UserError, match=r"no longer the one .*: other values in first/lora/lora_a"):
        save_adapter(tmp_path / "adapter", model, adapter)


def test_an_adapter_that_the_model_does_not_have():
    model, adapter = adapt(Model(nnx.Rngs(0)), [Rule("second", LoRA(rank=2))], rngs=nnx.Rngs(1))
    with pytest.raises(UserError, match="the model has no adapter 'default'"):
        only(merge(model)[0], adapter)


def test_three_steps_of_a_llama_in_tunix(tmp_path):
    pytest.importorskip("tunix", reason="trains with google-tunix, in an environment of its own")
    from tunix.models.llama3 import model as llama3
    from tunix.sft import peft_trainer, utils

    config = llama3.ModelConfig(
        num_layers=2, vocab_size=32, embed_dim=16, hidden_dim=24, num_heads=2, head_dim=8, num_kv_heads=1,
        rope_theta=10_000, norm_eps=1e-5,
    )  # fmt: skip
    registered = dict(KINDS)
    register_kernel(llama3.Einsum, "w", einsum=lambda module: module.einsum_str)
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            base = llama3.Llama3(config, rngs=nnx.Rngs(0))
            for layer in base.layers:  # tunix starts them at zero, and would train no gate.
                layer.mlp.down_proj.kernel[...] = jax.random.normal(jax.random.key(0), (24, 16))
                layer.mlp.up_proj.kernel[...] = jax.random.normal(jax.random.key(1), (16, 24))
            rules = [Rule(r"layers/\d+/attn/(q_proj|o_proj)", CirculantUpdate()), Rule(r".*/gate_proj", LoRA(rank=2))]
            model, adapter = adapt(base, rules, train=["final_norm/.*"], rngs=nnx.Rngs(1))
            before, trained = arrays(model), nnx.state(model, adapter.trainable)
            settings = peft_trainer.TrainingConfig(eval_every_n_steps=9, max_steps=3)
            trainer = peft_trainer.PeftTrainer(only(model, adapter), optax.adam(1e-2), settings)

            def inputs(batch):
                positions = utils.build_positions_from_mask(batch.input_mask)
                mask = utils.make_causal_attn_mask(batch.input_mask)
                return {"input_tokens": batch.input_tokens, "input_mask": batch.input_mask,
                        "positions": positions, "attention_mask": mask}  # fmt: skip

            tokens = np.arange(16).reshape(2, 8) % 32
            batch = peft_trainer.TrainingInput(input_tokens=tokens, input_mask=np.ones((2, 8), bool))
            trainer.with_gen_model_input_fn(inputs).train([batch] * 3)
            state = nnx.state(trainer.optimizer, nnx.optimizer.OptState)
            assert numbers(state) == 2 * numbers(trained) + 2
            after = arrays(trainer.model)
            moved = {path for path in before if not np.array_equal(before[path], after[path])}
            assert moved == {path for path, _ in nnx.to_flat_state(trained)}
            save_adapter(tmp_path / "adapter", trainer.model, adapter)
            loaded, _ = load_adapter(tmp_path / "adapter", base)
            call = (tokens, np.tile(np.arange(8), (2, 1)), None, np.tril(np.ones((2, 8, 8), bool)))
            y = trainer.model(*call)[0]
            assert same_bits(loaded(*call)[0], y)
            assert relative_error(merge(loaded)[0](*call)[0], y) < 1e-4 < relative_error(base(*call)[0], y)
    finally:
        KINDS.clear()
        KINDS.update(registered)
