"""Classifying sentences and pairs of them with BERT, or giving them a score: data, model, how it reads a batch."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from surm_jax import data
from surm_jax.devices.processes import share
from surm_jax.errors import UserError
from surm_jax.models import Bert, BertConfig
from surm_jax.pretrained import locate
from surm_jax.tasks.model_config import find_model_config
from surm_jax.tasks.objective import CLASSES, NUMBER, Objective
from surm_jax.training.adaptation import describe_model
from surm_jax.training.config import RunConfig
from surm_jax.training.step import Batch


@dataclasses.dataclass(frozen=True)
class TextTask:
    """What a run on text is about; see `surm_jax.tasks.base.Task`.

    Attributes:
        config: the whole configuration.
        dataset: names of classes, sentences and metrics; the examples themselves are below.
        train: training examples as tokens, without those held out.
        evaluated: examples by split: those for testing, and "holdout" if there is one.
        model_config: the model's geometry.
        checkpoint: the folder of the pretrained weights.
        tokenizer: the model's.
    """

    config: RunConfig
    dataset: data.TextDataset
    train: data.TokenSource
    evaluated: Mapping[str, data.TokenSource]
    model_config: BertConfig
    checkpoint: Path
    tokenizer: data.Tokenizer

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; empty where labels are numbers."""
        return self.dataset.classes

    @property
    def objective(self) -> Objective:
        """What the model's outputs mean."""
        return CLASSES if self.classes else NUMBER

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names in `surm_jax.tasks.scores.SCORES`, the most important first."""
        return self.dataset.metrics

    @property
    def tests(self) -> tuple[str, ...]:
        """The names of the splits for testing."""
        return tuple(self.dataset.tests)

    @property
    def splits(self) -> tuple[str, ...]:
        """What can be evaluated."""
        return tuple(self.evaluated)

    @property
    def examples(self) -> int:
        """Number of training examples."""
        return len(self.train)

    def make_model(self, seed: int) -> nnx.Module:
        """Builds the model with random parameters."""
        return Bert(self.model_config, rngs=nnx.Rngs(seed))

    @staticmethod
    def forward(model: nnx.Module, batch: Batch, key: jax.Array | None) -> jax.Array:
        """Returns the logits of a batch."""
        return model(batch["tokens"], mask=batch["token_mask"], token_types=batch["token_types"], rngs=key)

    def train_batches(self, seed: int) -> data.TrainBatches:
        """Returns the endless, resumable batches of a run: this process's part of each."""
        return data.text_train_batches(
            self.train, **share(self.config.data.batch_size), lengths=self.config.data.lengths, seed=seed
        )

    def eval_batches(self, split: str) -> data.EvalBatches:
        """Returns the batches of a pass over a split: this process's part of each."""
        return data.text_eval_batches(
            self.evaluated[split], **share(self.config.data.eval_batch_size), lengths=self.config.data.lengths
        )

    def export_options(self) -> dict[str, Any]:
        """Returns what `save_huggingface` is to write beside the weights: the files of the tokeniser."""
        return {"files": self.tokenizer.files}

    def train_shapes(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Returns every kind of batch that training will bring, by its length."""
        size, dtype = self.config.data.batch_size, "int32" if self.classes else "float32"
        shapes = {}
        for length in data.lengths_in_use(self.train, self.config.data.lengths):
            tokens = jax.ShapeDtypeStruct((size, length), "int32")
            shapes[f"{length} tokens"] = {
                "tokens": tokens,
                "token_types": tokens,
                "token_mask": jax.ShapeDtypeStruct((size, length), "bool"),
                "label": jax.ShapeDtypeStruct((size,), dtype),
            }
        return shapes


def text_task(config: RunConfig, dataset: data.TextDataset) -> TextTask:
    """Brings data, model and files together.

    Raises:
        UserError: for whatever does not fit.
    """
    bert = text_model_config(config, max(1, len(dataset.classes)))
    if config.data.lengths[-1] > bert.max_tokens:
        raise UserError(
            f"config.data.lengths goes up to {config.data.lengths[-1]} tokens, but the model has positions for"
            f" {bert.max_tokens}"
        )
    if config.optim.label_smoothing and not dataset.classes:
        raise UserError(
            f"config.optim.label_smoothing={config.optim.label_smoothing}, but the labels of {config.data.name} are"
            " numbers, which cannot be smoothed: set it to 0"
        )
    describe_model(config, lambda seed: Bert(bert, rngs=nnx.Rngs(seed)))
    checkpoint = locate(config.model.checkpoint)
    tokenizer = text_tokenizer(checkpoint, bert)
    train = data.first_examples(dataset.train, config.data.train_examples)
    kept, held_out = data.hold_out(train, config.data.holdout)
    splits = {**dataset.tests, **({} if held_out is None else {"holdout": held_out})}
    length = config.data.lengths[-1]
    return TextTask(
        config,
        dataset,
        tokenizer.encode(kept, length),
        {name: tokenizer.encode(source, length) for name, source in splits.items()},
        bert,
        checkpoint,
        tokenizer,
    )


def text_model_config(config: RunConfig, outputs: int) -> BertConfig:
    """Returns the configuration of the BERT with so many outputs.

    Raises:
        UserError: see `find_model_config`.
    """
    return find_model_config(config.model, Bert, BertConfig, outputs, "text")


def text_tokenizer(checkpoint: Path | None, bert: BertConfig) -> data.Tokenizer:
    """Returns the tokeniser that belongs to a model.

    Args:
        checkpoint: what `surm_jax.pretrained.locate` returned.
        bert: the model's configuration.

    Raises:
        UserError: if there is none beside the weights, or it is another model's.
    """
    if checkpoint is None:
        raise UserError(
            "config.model.checkpoint=none: a text model without a folder has no tokeniser. Give a folder of"
            " transformers or hf://owner/name"
        )
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    tokenizer = data.load_tokenizer(folder)
    ours, theirs = (bert.vocab_size, bert.pad_token), (tokenizer.vocab_size, tokenizer.pad_token)
    if theirs[0] > ours[0] or theirs[1] != ours[1]:
        raise UserError(
            f"the tokeniser in {folder} is of another model: it has {theirs[0]} tokens and fills up with number"
            f" {theirs[1]}, but the model knows {ours[0]} and expects {ours[1]}"
        )
    return tokenizer
