"""Text classification sets: sentences or pairs of sentences in memory, labelled with classes or scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from surm_jax.errors import UserError


@dataclass(frozen=True)
class TextSource:
    """Labelled sentences, or pairs of sentences.

    Attributes:
        sentences: The sentences of each example: one in all examples, or two in all.
        labels: (n,), int64 classes counted from 0, or float32 scores.

    Raises:
        UserError: The numbers of labels and examples differ, or only some examples are pairs.

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
    """A set of labelled sentences or pairs of sentences.

    Attributes:
        name: The name that `load` was given, with the version that was found.
        train: Training examples.
        tests: Test examples by the name of the split: "test", or several such as "test_matched" and "test_mismatched".
        classes: Class names; the label `k` stands for `classes[k]`. Empty if labels are scores.
        columns: Names of the sentences of an example, such as ("sentence1", "sentence2").
        metrics: Names of the official metrics, the one to report first.
    """

    name: str
    train: TextSource
    tests: Mapping[str, TextSource]
    classes: tuple[str, ...]
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
