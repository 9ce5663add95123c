"""Fine-tuning of models that continue text, on texts, prompts with completions, and chats."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
from flax import nnx

from surm_jax import data
from surm_jax.devices.processes import share
from surm_jax.errors import UserError
from surm_jax.generation import GENERATION_NAME, read_settings
from surm_jax.pretrained import locate
from surm_jax.tasks.base import Batch, Task, register_task
from surm_jax.tasks.config import DataConfig, ModelConfig
from surm_jax.tasks.objective import PERPLEXITY, Objective, TokenLosses, token_losses

TOKENS = Objective(
    lambda outputs, labels, smoothing: outputs.losses.sum(1),
    lambda outputs: outputs.predictions,
    classifies=True,
    no_label=data.NO_LABEL,
)
"""The cross-entropy of the tokens that are learned. Every such token counts equally."""


@register_task
@dataclasses.dataclass(frozen=True)
class CausalLM(Task):
    """The task to write the next token.

    Training examples are packed into rows of the largest of `config.data.lengths` tokens, and a batch is a number of
    rows. For evaluation, every example has a row of its own.

    Attributes:
        config: The section `config.data`.
        dataset: The lines of text.
        train: The tokenised training examples, without those held out.
        rows: The indices of the training examples in each row.
        evaluated: The tokenised examples of each split that can be evaluated.
        model_config: The configuration of the model.
        checkpoint: The file or folder of the pretrained weights.
        tokenizer: The tokenizer of the model.
    """

    config: DataConfig
    dataset: data.LineDataset
    train: data.LearnedTokens
    rows: Sequence[Sequence[int]]
    evaluated: Mapping[str, data.LearnedTokens]
    model_config: Any
    checkpoint: Path | None
    tokenizer: data.PromptTokenizer

    reads: ClassVar = "prompts"

    @classmethod
    def accepts(cls, name: str) -> bool:
        """Return whether the name stands for JSON lines (`surm_jax.data.load_lines`)."""
        return data.is_lines(name)

    @classmethod
    def load(cls, config: DataConfig) -> data.LineDataset:
        """Read the lines.

        Raises:
            UserError: A file or a line cannot be read, or there is nothing to evaluate.
        """
        dataset = data.load_lines(config.name, config.max_corrupt)
        if not (dataset.tests or config.holdout):
            raise UserError(
                f"{config.name} has nothing to evaluate on: hold out examples (config.data.holdout=100), or put a file"
                " beside it with a name that ends in _test.jsonl or _validation.jsonl"
            )
        return dataset

    @classmethod
    def build(cls, model: ModelConfig, config: DataConfig, dataset: data.LineDataset, geometry: Any) -> "CausalLM":
        """Find or download the weights and the tokenizer, tokenise all splits, and return the task.

        Raises:
            UserError: The tokenizer is missing or of another model, or too many lines are unusable.
        """
        checkpoint = locate(model.checkpoint)
        tokenizer = find_tokenizer(checkpoint)
        if tokenizer.vocab_size > geometry.vocab_size:
            raise UserError(
                f"the tokenizer in {tokenizer.files[0].parent} has {tokenizer.vocab_size} tokens, but the model has"
                f" embeddings of {geometry.vocab_size}: take the tokenizer of this model"
            )
        ends = geometry.end_tokens if tokenizer.end is None else (tokenizer.end,)
        if not ends:
            raise UserError(f"the tokenizer in {tokenizer.files[0].parent} names no eos_token, which ends a text")
        kept, held_out = data.hold_out(data.first_examples(dataset.train, config.train_examples), config.holdout)
        splits = dict(dataset.tests)
        if held_out is not None:
            splits["holdout"] = dataclasses.replace(held_out, malformed=())
        train, *others = (
            data.encode_lines(
                tokenizer, source, max_length=config.lengths[-1], end=ends[0], max_corrupt=config.max_corrupt
            )
            for source in (kept, *splits.values())
        )
        evaluated = dict(zip(splits, others, strict=True))
        rows = data.pack(train.lengths, config.lengths[-1])
        return cls(config, dataset, train, rows, evaluated, geometry, checkpoint, tokenizer)

    @classmethod
    def reads_beside(cls, checkpoint: Path | None) -> dict[str, Any]:
        """Return the files of the tokenizer, which a run records in addition to data and weights."""
        return {"tokenizer": find_tokenizer(checkpoint).files}

    @property
    def objective(self) -> Objective:
        """The cross-entropy of the tokens that are learned."""
        return TOKENS

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics: the accuracy of the most probable token, and the perplexity."""
        return ("accuracy", PERPLEXITY)

    @property
    def tests(self) -> tuple[str, ...]:
        """The names of the test splits: those of the files for evaluation, or "holdout" if there are none."""
        return tuple(self.dataset.tests) or ("holdout",)

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits that can be evaluated."""
        return tuple(self.evaluated)

    @property
    def examples(self) -> int:
        """The number of rows of an epoch."""
        return len(self.rows)

    @staticmethod
    def forward(model: nnx.Module, batch: Batch, key: jax.Array | None) -> jax.Array:
        """Run the model on a batch of tokens and return the logits of all tokens. The key is for dropout."""
        return model(batch["tokens"], segments=batch["segments"], rngs=key)

    @classmethod
    def outputs(cls, model: Any, batch: Batch, key: jax.Array | None) -> TokenLosses:
        """Run the model on a batch of tokens and return the loss of every token, without all logits in memory."""
        features = model.features(batch["tokens"], segments=batch["segments"], rngs=key)
        return token_losses(model.logits, features, batch["label"], no_label=data.NO_LABEL)

    def train_batches(self, seed: int) -> data.TrainBatches:
        """Return an endless iterator over training batches, with this process's rows of each batch."""
        length = self.config.lengths[-1]
        return data.packed_train_batches(
            self.train, self.rows, length=length, seed=seed, **share(self.config.batch_size)
        )

    def eval_batches(self, split: str) -> data.EvalBatches:
        """Return the batches of one pass over a split, with this process's rows of each batch."""
        return data.line_eval_batches(
            self.evaluated[split], lengths=self.config.lengths, **share(self.config.eval_batch_size)
        )

    def train_shapes(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Return the only shape of a training batch."""
        length = self.config.lengths[-1]
        part = jax.ShapeDtypeStruct((self.config.batch_size, length), "int32")
        return {f"{length} tokens": dict.fromkeys(("tokens", "segments", "label"), part)}

    def export_options(self) -> dict[str, Any]:
        """Return the files that an export copies into the folder of the model: tokenizer and defaults of generation.

        Raises:
            UserError: The defaults (`surm_jax.generation.read_settings`) are damaged or cannot be followed.
        """
        folder = self.tokenizer.files[0].parent
        read_settings(folder)
        path = folder / GENERATION_NAME
        return {"files": (*self.tokenizer.files, *([path] if path.is_file() else []))}


def find_tokenizer(checkpoint: Path | None) -> data.PromptTokenizer:
    """Read the tokenizer in the folder of a model.

    Raises:
        UserError: There is no folder, or no tokenizer that can be read.
    """
    if checkpoint is None:
        raise UserError(
            "config.model.checkpoint=none: a model that continues text has no tokenizer without a folder. Give a folder"
            " of transformers or hf://owner/name"
        )
    return data.load_prompt_tokenizer(checkpoint if checkpoint.is_dir() else checkpoint.parent)
