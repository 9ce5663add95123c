"""Text data sets: sentences or pairs of sentences in memory, labelled with classes or scores."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from surm_jax.errors import UserError

_MOST_CLASSES = 1_000_000


@dataclass(frozen=True)
class TextSource:
    """A sequence of labelled sentences, or of labelled pairs of sentences.

    Attributes:
        sentences: A tuple of sentences for each example. All examples have one sentence, or all have two.
        labels: An array of shape (n,), which holds classes counted from 0 as int64, or scores as float32.

    Raises:
        UserError: The numbers of labels and examples differ, only some examples are pairs, a sentence is not text, or
            a label is neither a class counted from 0 nor a finite score.

    In the example, `select` returns the third and the first of three examples:

    >>> source = TextSource([("It rains.",), ("It pours.",), ("The sun shines.",)], np.array([0, 0, 1]))
    >>> len(source), source.select([2, 0]).sentences, source.select([2, 0]).labels
    (3, [('The sun shines.',), ('It rains.',)], array([1, 0]))
    """

    sentences: Sequence[tuple[str, ...]]
    labels: Int[np.ndarray, "n"] | Float[np.ndarray, "n"]

    def __post_init__(self):
        object.__setattr__(self, "labels", checked_labels(self.labels, len(self.sentences)))
        if (counts := {len(sentences) for sentences in self.sentences}) not in (set(), {1}, {2}):
            raise UserError(f"all examples must have one sentence, or all must have two; got {sorted(counts)}")
        for index, sentences in enumerate(self.sentences):
            if why := next(filter(None, map(_not_text, sentences)), None):
                raise UserError(f"example {index} holds {why}, but sentences must be text")

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

    Raises:
        UserError: The names of the classes are not different strings or there is only one, a split is empty, or its
            examples do not fit the classes or the columns. If a class has no training example, a warning says so.
    """

    name: str
    train: TextSource
    tests: Mapping[str, TextSource]
    classes: tuple[str, ...]
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    files: tuple[Path, ...] = ()

    def __post_init__(self):
        names = self.classes
        if len({*names}) < len(names) or not all(
            isinstance(name, str) and name.strip() and name.isprintable() for name in names
        ):
            raise UserError(f"{self.name}: the names of classes must be different lines of text, got {list(names)}")
        if len(names) == 1:
            raise UserError(f"{self.name} has the single class {names[0]!r}: there is nothing to learn")
        if not self.tests:
            raise UserError(f"{self.name} has no test split")
        for split, source in {"train": self.train, **self.tests}.items():
            self._check(f"{self.name}, split {split}", source)
        if absent := [name for label, name in enumerate(names) if label not in {*self.train.labels.tolist()}]:
            warnings.warn(f"{self.name} has no training example of the class {absent[0]!r}", stacklevel=3)

    def _check(self, where: str, source: TextSource) -> None:
        if not len(source):
            raise UserError(f"{where} has no examples")
        if len(source.sentences[0]) != len(self.columns):
            raise UserError(
                f"{where}: examples have {len(source.sentences[0])} sentence(s), but the columns are"
                f" {', '.join(self.columns)}"
            )
        if (source.labels.dtype.kind == "i") != bool(self.classes):
            raise UserError(
                f"{where}: labels are {source.labels.dtype}, but "
                + ("must be integers, since there are classes" if self.classes else "scores must be float32")
            )
        if self.classes and (highest := source.labels.max()) >= len(self.classes):
            raise UserError(
                f"{where}: example {source.labels.argmax()} has label {highest}, outside 0 to {len(self.classes) - 1}"
            )


def checked_labels(labels: np.ndarray, count: int) -> Int[np.ndarray, "n"] | Float[np.ndarray, "n"]:
    """Return the labels of `count` examples as int64 classes or float32 scores.

    Raises:
        UserError: There are more or fewer labels, or a label is neither a class counted from 0 nor a finite score.
    """
    labels = np.asarray(labels)
    if labels.shape != (count,):
        raise UserError(f"{count} examples and labels of shape {labels.shape} do not fit together: expected ({count},)")
    if labels.dtype.kind not in "iuf":
        raise UserError(f"labels are {labels.dtype}, but must be integers counted from 0, or floating-point scores")
    classes = labels.dtype.kind != "f"
    fits = (labels >= 0) & (labels < _MOST_CLASSES) if classes else np.isfinite(labels)
    if (wrong := np.flatnonzero(~fits)).size:
        raise UserError(
            f"label {wrong[0]} is {labels[wrong[0]]}, but "
            + (f"classes are counted from 0 and below {_MOST_CLASSES:,}" if classes else "scores must be finite")
        )
    return labels.astype(np.int64 if classes else np.float32, copy=False)


def _not_text(sentence: object) -> str | None:
    """Return a description of a sentence that is not text, for an error message. Return None if it is text."""
    if not isinstance(sentence, str):
        return f"{sentence!r}"
    try:
        sentence.isascii() or sentence.encode()
    except UnicodeEncodeError as error:
        return f"{sentence!r} ({error.reason})"
    return None
