"""The tokeniser of a text model, and tables of new sentences whose labels are predicted."""

import csv
import dataclasses
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from surm_jax import data
from surm_jax.errors import UserError
from surm_jax.files import replacing
from surm_jax.tasks.config import DataConfig


def load_tokenizer(checkpoint: Path | None, geometry: Any) -> data.Tokenizer:
    """Load the tokeniser that belongs to a model.

    Args:
        checkpoint: The file or folder of the weights, from `surm_jax.pretrained.locate`.
        geometry: The configuration of the model.

    Raises:
        UserError: The folder of the weights has no tokeniser, or one of another model.
    """
    if checkpoint is None:
        raise UserError(
            "config.model.checkpoint=none: a text model without a folder has no tokeniser. Give a folder of"
            " transformers or hf://owner/name"
        )
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    tokenizer = data.load_tokenizer(folder)
    if tokenizer.vocab_size > geometry.vocab_size or tokenizer.pad_token != geometry.pad_token:
        raise UserError(
            f"the tokeniser in {folder} is of another model: it has {tokenizer.vocab_size} tokens and pads with number"
            f" {tokenizer.pad_token}, but the model knows {geometry.vocab_size} and expects {geometry.pad_token}"
        )
    return tokenizer


@dataclasses.dataclass(frozen=True)
class Sentences:
    """The well-formed rows of a table of sentences; implements `surm_jax.tasks.base.Questions`.

    Attributes:
        lines: The line number of each row, counted from 1.
        rows: The one or two sentences of each row.
        malformed: A message for each malformed row, with its line number and what is wrong.
    """

    lines: tuple[int, ...]
    rows: tuple[tuple[str, ...], ...]
    malformed: tuple[str, ...]

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def batches(self, checkpoint: Path | None, geometry: Any, config: DataConfig) -> data.EvalBatches:
        """Return the batches of one pass over the rows as tokens."""
        source = data.TextSource(list(self.rows), np.zeros(self.count, np.int64))
        tokens = load_tokenizer(checkpoint, geometry).encode(source, config.lengths[-1])
        return data.text_eval_batches(tokens, batch_size=config.eval_batch_size, lengths=config.lengths)

    def write(self, target: Path, classes: Sequence[str], logits: np.ndarray) -> None:
        """Write a table with line number, label and the probability of each class, or with line number and score.

        Raises:
            UserError: The file cannot be written.
        """
        text = io.StringIO()
        table = csv.writer(text, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None)
        if classes:
            table.writerow(["line", "label", *classes])
            for line, probabilities in zip(self.lines, np.asarray(jax.nn.softmax(logits)), strict=True):
                label = classes[int(probabilities.argmax())]
                table.writerow([line, label, *(f"{probability:.6f}" for probability in probabilities)])
        else:
            table.writerow(["line", "score"])
            table.writerows([line, f"{score:.6f}"] for line, score in zip(self.lines, logits[:, 0], strict=True))
        try:
            with replacing(target) as temporary:
                temporary.write_text(text.getvalue())
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror}") from None
        print(f"{target}: {self.count} rows; {len(self.malformed)} malformed ones were left out")


def read_sentences(path: Path, columns: Sequence[str]) -> Sentences:
    """Read a table of sentences: UTF-8, one row per line, columns separated by tabs; quotes have no meaning.

    Empty lines are skipped, and so is a first line that holds the names of the columns, in upper or lower case. Each
    malformed row is left out and reported on the standard error.

    Args:
        path: The file.
        columns: The names of the columns.

    Raises:
        UserError: The file cannot be read, or no row is well-formed.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    numbers: list[int] = []
    rows: list[tuple[str, ...]] = []
    malformed: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            sentences = tuple(line.removesuffix(b"\r").decode().split("\t"))
        except UnicodeDecodeError as error:
            malformed.append(f"{path}, line {number}: not UTF-8 (byte {error.start + 1})")
            continue
        names = tuple(sentence.strip().casefold() for sentence in sentences)
        if sentences == ("",) or (number == 1 and names == tuple(columns)):
            continue
        if len(sentences) != len(columns):
            malformed.append(
                f"{path}, line {number}: {len(sentences)} columns, expected {len(columns)} ({', '.join(columns)})"
            )
        elif empty := [name for name, sentence in zip(columns, sentences, strict=True) if not sentence.strip()]:
            malformed.append(f"{path}, line {number}: {empty[0]} is empty")
        else:
            numbers.append(number)
            rows.append(sentences)
    for complaint in malformed:
        print(complaint, file=sys.stderr)
    if not rows:
        raise UserError(f"{path} has no well-formed row of sentences")
    return Sentences(tuple(numbers), tuple(rows), tuple(malformed))
