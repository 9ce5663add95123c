"""Text data sets, which hold labelled sentences or labelled pairs of sentences in memory.

The labels are classes or scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from surm_jax.errors import UserError


@dataclass(frozen=True)
class TextSource:
    """A sequence of labelled sentences, or of labelled pairs of sentences.

    Attributes:
        sentences: A tuple of sentences for each example. All examples have one sentence, or all have two.
        labels: An array of shape (n,), which holds classes counted from 0 as int64, or scores as float32.

    Raises:
        UserError: The numbers of labels and examples differ, or only some examples are pairs.

    In the example, `select` returns the third and the first of three examples:

    >>> source = TextSource([("It rains.",), ("It pours.",), ("The sun shines.",)], np.array([0, 0, 1]))
    >>> len(source), source.select([2, 0]).sentences, source.select([2, 0]).labels
    (3, [('The sun shines.',), ('It rains.',)], array([1, 0]))
    """

    sentences: Sequence[tuple[str, ...]]
    labels: Int[np.ndarray, "n"] | Float[np.ndarray, "n"]

    def __post_init__(self):
        if self.labels.shape != (len(self.sentences),):
            raise UserError(
                f"{len(self.sentences)} examples and labels of shape {self.labels.shape} do not fit together: "
                f"expected ({len(self.sentences)},)"
            )
        if (counts := {len(sentences) for sentences in self.sentences}) not in (set(), {1}, {2}):
            raise UserError(f"all examples must have one sentence, or all must have two; got {sorted(counts)}")

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Sequence[int] | Int[np.ndarray, "k"]) -> "TextSource":
        """Return the examples at `indices`, in this order."""
        return TextSource([self.sentences[index] for index in indices], self.labels[indices])


@dataclass(frozen=True)
class TextDataset:
    """A data set of labelled sentences, or of labelled pairs of sentences.

    Attributes:
        name: The name that was passed to `load`, with the version that was found.
        train: The training examples.
        tests: The test examples, by the name of the split. There is one split "test", or there are several, such as
            "test_matched" and "test_mismatched".
        classes: The names of the classes. The label `k` stands for `classes[k]`. The tuple is empty if the labels are
            scores.
        columns: The name of each sentence in an example, such as ("sentence1", "sentence2").
        metrics: The names of the official metrics. The first one is the main metric.
        files: The files that the data set was read from.
    """

    name: str
    train: TextSource
    tests: Mapping[str, TextSource]
    classes: tuple[str, ...]
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    files: tuple[Path, ...] = ()
