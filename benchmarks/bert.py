"""Time a training step of BERT-base in this package and in PyTorch with transformers and peft, in one run.

    python -m benchmarks.bert [--out=FILE.json] [--variant=base] [--batch=16] [--length=128] [--rounds=5]

The packages of `requirements-peers.txt` must be installed. All steps start from the same random weights and use the
same batch (without padding, but with a mask), in float32 and without dropout. They train updates of Q, K and V and a
classifier of two classes with AdamW. The steps are:

- `ours circulant`: circulant updates of this package, each made from two trained vectors.
- `ours lora` and `peft lora`: LoRA with r = 1, of this package and of `peft`.
- `peft c3a`: circulant updates of `peft`, with one block as large as the kernel and so one trained vector each. The
  versions 0.18.0 to 0.21.2 of peft compute a wrong gradient with respect to the INPUT (see `benchmarks/peers.py`). The
  time is reported all the same.

In PyTorch, the steps use `sdpa` attention, the fused AdamW and a thread for each core. All updates are zero at first,
so the first step must have the same loss in all programs. This is checked before anything is timed.
`ratio_to_circulant` is the time of a step over that of `ours circulant`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import torch
import transformers
from absl import flags
from flax import nnx

from benchmarks.timing import benchmark, device, medians, setting, table, write
from surm_jax.errors import UserError
from surm_jax.models import Bert, BertConfig
from surm_jax.paths import join
from surm_jax.peft import CirculantUpdate, LoRA, Rule, Update, adapt
from surm_jax.pretrained.hf.folder import huggingface_names

VARIANT = flags.DEFINE_string("variant", "base", "The BERT.")
BATCH = flags.DEFINE_integer("batch", 16, "Examples per step.", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 128, "Tokens per example.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "How often each step is timed.", lower_bound=1)
CLASSES = 2
LEARNING_RATE = 1e-4
COLUMNS = {"step": "", "parameters": ",", "ms": ".1f", "examples_per_s": ".2f", "ratio_to_circulant": ".2f"}

Batch = dict[str, np.ndarray]
Program = Callable[[], float]


def random_batch(config: BertConfig) -> Batch:
    """Return a batch of random tokens and labels, with a mask that marks all tokens as valid."""
    rng, shape = np.random.default_rng(0), (BATCH.value, LENGTH.value)
    return {
        "tokens": rng.integers(config.vocab_size, size=shape),
        "mask": np.ones(shape, np.int64),
        "label": rng.integers(CLASSES, size=BATCH.value),
    }


def our_step(model: Bert, method: Update, batch: Batch) -> tuple[Program, int]:
    """Return a function that takes one training step of this package, and the number of trained parameters.

    Args:
        model: The base model.
        method: The update of Q, K and V.
        batch: The batch that every step uses.

    Returns:
        The function, which returns the loss of its step, and the number.
    """
    rules = [Rule(r".*/(query|key|value)", method)]
    adapted, adapter = adapt(model, rules, train=["head/.*"], rngs=nnx.Rngs(1))
    graphdef, trained, frozen = nnx.split(adapted, adapter.trainable, ...)
    optimizer = optax.adamw(LEARNING_RATE)

    def loss(trained: nnx.State, frozen: nnx.State, batch: dict[str, jax.Array]) -> jax.Array:
        logits = nnx.merge(graphdef, trained, frozen)(batch["tokens"], mask=batch["mask"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    def update(state: tuple[nnx.State, optax.OptState], frozen: nnx.State, batch: dict[str, jax.Array]):
        trained, optimizer_state = state
        value, gradients = jax.value_and_grad(loss)(trained, frozen, batch)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, trained)
        return (optax.apply_updates(trained, updates), optimizer_state), value

    # Copy the state, because the step donates its buffers, and the model still uses the buffers of the head.
    state = jax.tree.map(jnp.copy, (trained, optimizer.init(trained)))
    arrays = {name: jnp.asarray(array, jnp.int32) for name, array in batch.items()}
    compiled = jax.jit(update, donate_argnums=0).lower(state, frozen, arrays).compile()

    def program() -> float:
        nonlocal state
        state, value = compiled(state, frozen, arrays)
        return float(value)

    return program, sum(leaf.size for leaf in jax.tree.leaves(trained))


def torch_model(model: Bert) -> torch.nn.Module:
    """Return a model of the package transformers that has the same weights as a model of this package."""
    names = huggingface_names(model.config)
    config = transformers.BertConfig(**names.architecture.write_config(model.config))
    theirs = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa")
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name, tensor = names.tensor(join(path))
        tensors[name] = torch.tensor(tensor.write(np.asarray(variable[...])))
    theirs.load_state_dict(tensors)
    return theirs


def torch_step(base: torch.nn.Module, config: peft.PeftConfig, batch: Batch) -> tuple[Program, int]:
    """Return a function that takes one training step in PyTorch, and the number of trained parameters.

    Args:
        base: The base model.
        config: The configuration of peft's adapter.
        batch: The batch that every step uses.

    Returns:
        The function, which returns the loss of its step, and the number.
    """
    model = peft.get_peft_model(base, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=1e-4, fused=True)
    names = {"tokens": "input_ids", "mask": "attention_mask", "label": "labels"}
    tensors = {names[name]: torch.tensor(array) for name, array in batch.items()}

    def program() -> float:
        optimizer.zero_grad()
        loss = model(**tensors).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return program, sum(parameter.numel() for parameter in trained)


def main() -> None:
    """Time all steps, print a table of the results, and write them as rows to the file of `--out`."""
    config = BertConfig.from_variant(VARIANT.value, num_classes=CLASSES)
    if LENGTH.value > config.max_tokens:
        raise UserError(
            f"--variant={VARIANT.value} has positions for {config.max_tokens} tokens, got --length={LENGTH.value}"
        )
    model, batch = Bert(config, rngs=nnx.Rngs(0)), random_batch(config)
    layers = {"target_modules": ["query", "key", "value"], "modules_to_save": ["classifier"]}
    c3a = peft.C3AConfig(block_size=config.width, init_weights=True, **layers)
    steps = {
        "ours circulant": our_step(model, CirculantUpdate(), batch),
        "ours lora": our_step(model, LoRA(rank=1), batch),
        "peft lora": torch_step(torch_model(model), peft.LoraConfig(r=1, **layers), batch),
        "peft c3a": torch_step(torch_model(model), c3a, batch),
    }
    programs = {name: program for name, (program, _) in steps.items()}
    losses = {name: program() for name, program in programs.items()}
    if not all(math.isclose(loss, losses["ours circulant"], rel_tol=1e-3) for loss in losses.values()):
        raise RuntimeError(f"the programs do not compute the same: the losses of their first steps are {losses}")
    times = medians(programs, ROUNDS.value)
    rows: list[dict[str, Any]] = [
        {
            "step": name,
            "model": f"BERT-{VARIANT.value}",
            "batch": BATCH.value,
            "length": LENGTH.value,
            "dtype": "float32",
            **setting(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "parameters": steps[name][1],
            "first_loss": losses[name],
            "ms": 1e3 * seconds,
            "examples_per_s": BATCH.value / seconds,
            "ratio_to_circulant": seconds / times["ours circulant"],
        }
        for name, seconds in times.items()
    ]
    print(
        f"BERT-{VARIANT.value}, batch {BATCH.value}, {LENGTH.value} tokens, float32, on {device()};"
        f" torch {torch.__version__} with {torch.get_num_threads()} threads, transformers {transformers.__version__},"
        f" peft {peft.__version__}, jax {jax.__version__}"
    )
    print(table(rows, COLUMNS))
    write(rows)


if __name__ == "__main__":
    benchmark(main)
