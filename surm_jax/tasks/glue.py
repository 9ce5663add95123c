"""The tasks of the GLUE benchmark, which predict the class or the score of a sentence or of a pair of sentences."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import jax
from flax import nnx

from surm_jax import data
from surm_jax.devices.processes import share
from surm_jax.pretrained import locate
from surm_jax.tasks.base import Batch, SplitInputs, Task, register_task
from surm_jax.tasks.config import DataConfig, ModelConfig
from surm_jax.tasks.objective import CLASSES, NUMBER, Objective
from surm_jax.tasks.sentences import Sentences, find_tokenizer, load_tokenizer, read_sentences


@register_task
@dataclasses.dataclass(frozen=True)
class Glue(Task):
    """A task of the GLUE benchmark (arXiv 1804.07461).

    Attributes:
        config: The section `config.data`.
        dataset: The sentences with their labels, and the names of the classes and the metrics.
        train: The tokenised training examples, without those held out.
        evaluated: The tokenised examples of each split that can be evaluated: the test splits, and "holdout" if
            training examples are held out.
        model_config: The configuration of the model.
        checkpoint: The file or folder of the pretrained weights.
        tokenizer: The tokeniser of the model.
        states: The stored states that take the place of tokens, by split. It is empty if nothing is stored.
    """

    config: DataConfig
    dataset: data.TextDataset
    train: data.TokenSource
    evaluated: Mapping[str, data.TokenSource]
    model_config: Any
    checkpoint: Path | None
    tokenizer: data.Tokenizer
    states: Mapping[str, data.States] = dataclasses.field(default_factory=dict)

    reads: ClassVar = "text"

    @classmethod
    def accepts(cls, name: str) -> bool:
        """Return whether the name is that of a task of GLUE, such as "glue/rte"."""
        return data.is_text(name)

    @classmethod
    def load(cls, config: DataConfig) -> data.TextDataset:
        """Load the data set of sentences.

        Raises:
            UserError: The data set is missing or damaged.
        """
        return cast(data.TextDataset, data.load(config.name, config.dir or None))

    @classmethod
    def build(cls, model: ModelConfig, config: DataConfig, dataset: data.TextDataset, geometry: Any) -> "Glue":
        """Find or download the weights and the tokeniser, tokenise all splits, and return the task."""
        train = data.first_examples(dataset.train, config.train_examples)
        kept, held_out = data.hold_out(train, config.holdout)
        checkpoint = locate(model.checkpoint)
        tokenizer = load_tokenizer(checkpoint, geometry)
        splits = {**dataset.tests, **({} if held_out is None else {"holdout": held_out})}
        length = config.lengths[-1]
        evaluated = {name: tokenizer.encode(source, length) for name, source in splits.items()}
        return cls(config, dataset, tokenizer.encode(kept, length), evaluated, geometry, checkpoint, tokenizer)

    @classmethod
    def read_questions(cls, config: DataConfig, source: Path) -> Sentences:
        """Read a table of sentences without labels, for `launch.py --mode=predict`."""
        return read_sentences(source, data.glue_task(config.name).columns)

    @classmethod
    def reads_beside(cls, checkpoint: Path | None) -> dict[str, Any]:
        """Return the files of the tokeniser, which a run records in addition to data and weights."""
        return {"tokenizer": find_tokenizer(checkpoint).files}

    @property
    def objective(self) -> Objective:
        """The cross-entropy for a task with classes, and the squared error for a task with real numbers as labels."""
        return CLASSES if self.classes else NUMBER

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the task's metrics (`surm_jax.tasks.scores.SCORES`), beginning with the most important."""
        return self.dataset.metrics

    @property
    def tests(self) -> tuple[str, ...]:
        """The names of the test splits."""
        return tuple(self.dataset.tests)

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits that can be evaluated: `tests`, and "holdout" if training examples are held out."""
        return tuple(self.evaluated)

    @property
    def examples(self) -> int:
        """The number of training examples."""
        return len(self.train)

    @staticmethod
    def forward(model: nnx.Module, batch: Batch, key: jax.Array | None) -> jax.Array:
        """Run the model on a batch of tokens and return its logits. The key is for dropout; None means no dropout."""
        return model(batch["tokens"], mask=batch["token_mask"], token_types=batch["token_types"], rngs=key)

    def train_batches(self, seed: int) -> data.TrainBatches:
        """Return an endless iterator over training batches, with this process's rows of each batch."""
        return data.text_train_batches(
            self.train,
            **share(self.config.batch_size),
            lengths=self.config.lengths,
            seed=seed,
            states=self.states.get("train"),
        )

    def eval_batches(self, split: str) -> data.EvalBatches:
        """Return the batches of one pass over a split, with this process's rows of each batch."""
        return data.text_eval_batches(
            self._source(split),
            **share(self.config.eval_batch_size),
            lengths=self.config.lengths,
            states=self.states.get(split),
        )

    def _source(self, split: str) -> data.TokenSource:
        return self.train if split == "train" else self.evaluated[split]

    def train_shapes(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Return the shapes of a training batch, one entry for every padded length that occurs in the data."""
        size, dtype = self.config.batch_size, "int32" if self.classes else "float32"
        shapes, stored = {}, self.states.get("train")
        for length in data.lengths_in_use(self.train, self.config.lengths):
            tokens = jax.ShapeDtypeStruct((size, length), "int32")
            shapes[f"{length} tokens"] = {
                "tokens": tokens if stored is None else _shape(stored, size, length),
                "token_types": tokens,
                "token_mask": jax.ShapeDtypeStruct((size, length), "bool"),
                "label": jax.ShapeDtypeStruct((size,), dtype),
            }
        return shapes

    def inputs(self, split: str) -> SplitInputs:
        """Return what says which tokens the model reads for a split."""
        source = self._source(split)
        return SplitInputs(
            data.digest_of(source.tokens, source.token_types, source.offsets), len(source), source.offsets
        )

    def with_states(self, states: Mapping[str, data.States]) -> "Glue":
        """Return the same task with stored states in the place of tokens."""
        return dataclasses.replace(self, states=states)

    def export_options(self) -> dict[str, Any]:
        """Return the files of the tokeniser, which an export copies into the folder of the model."""
        return {"files": self.tokenizer.files}


def _shape(states: data.States, size: int, length: int) -> jax.ShapeDtypeStruct:
    lengths = () if states.offsets is None else (length,)
    return jax.ShapeDtypeStruct((size, *lengths, *states.rows.shape[1:]), states.rows.dtype)
