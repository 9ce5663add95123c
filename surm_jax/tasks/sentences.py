"""The tokeniser of a text model, and tables of new sentences, which `launch.py --mode=predict` labels."""

import csv
import dataclasses
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from surm_jax import data
from surm_jax.atomic import replacing
from surm_jax.errors import UserError

# Names of columns that tables of sentences have. Sentences that consist of such a word are not expected.
_COLUMNS = frozenset(
    {"id", "idx", "index", "label", "score", "text"}.union(*(task.columns for task in data.GLUE_TASKS.values()))
)


def find_tokenizer(checkpoint: Path | None) -> data.Tokenizer:
    """Load the tokeniser from the folder of a model's weights, without checking that it fits the model.

    Raises:
        UserError: There is no folder of weights (`checkpoint` is None), or it has no tokeniser.
    """
    if checkpoint is None:
        raise UserError(
            "config.model.checkpoint=none: a text model without a folder has no tokeniser. Give a folder of"
            " transformers or hf://owner/name"
        )
    return data.load_tokenizer(checkpoint if checkpoint.is_dir() else checkpoint.parent)


def load_tokenizer(checkpoint: Path | None, geometry: Any) -> data.Tokenizer:
    """Load the tokeniser from the folder of a model's weights, and check that it fits the model.

    Args:
        checkpoint: The file or folder of the weights, as `surm_jax.pretrained.locate` returns it.
        geometry: The configuration of the model.

    Raises:
        UserError: There is no folder of weights (`checkpoint` is None), or its tokeniser is missing or does not fit.
    """
    tokenizer = find_tokenizer(checkpoint)
    if tokenizer.vocab_size > geometry.vocab_size or tokenizer.pad_token != geometry.pad_token:
        raise UserError(
            f"the tokeniser in {checkpoint} is of another model: it has {tokenizer.vocab_size} tokens and pads with"
            f" number {tokenizer.pad_token}, but the model knows {geometry.vocab_size} and expects {geometry.pad_token}"
        )
    return tokenizer


@dataclasses.dataclass(frozen=True)
class Sentences:
    """The well-formed rows of a table of sentences without labels, as `surm_jax.tasks.base.Questions`.

    Attributes:
        lines: The line number of each row in the file, counted from 1.
        rows: The one or two sentences of each row.
        malformed: A message for each malformed row, with its line number and its error.
    """

    lines: tuple[int, ...]
    rows: tuple[tuple[str, ...], ...]
    malformed: tuple[str, ...]

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def batches(
        self, checkpoint: Path | None, geometry: Any, batch_size: int, lengths: tuple[int, ...]
    ) -> data.EvalBatches:
        """Tokenise the rows, and return the batches of one pass over them (see `Questions.batches`)."""
        source = data.TextSource(list(self.rows), np.zeros(self.count, np.int64))
        tokens = load_tokenizer(checkpoint, geometry).encode(source, lengths[-1])
        return data.text_eval_batches(tokens, batch_size=batch_size, lengths=lengths)

    def write(self, target: Path, classes: Sequence[str], logits: np.ndarray) -> None:
        """Write the predictions to a table whose columns are separated by tabs, and print how many there are.

        The columns are the line number, the predicted class and the probability of each class. If there are no classes,
        they are the line number and the predicted score.

        Args:
            target: The file.
            classes: The names of the classes. It is empty if the model predicts a score.
            logits: The outputs of the model, of shape (count, outputs).

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
        # The table itself may go to the standard output.
        print(f"{target}: {self.count} rows; {len(self.malformed)} malformed ones were left out", file=sys.stderr)


def read_sentences(path: Path, columns: Sequence[str]) -> Sentences:
    """Read a table of sentences without labels from a file.

    The file is UTF-8 text with one row per line and tabs between the columns. Quotes have no special meaning, and empty
    lines are skipped. If the first line names the columns (in upper or lower case), they may come in any order.
    Otherwise they have the order of `columns`. Malformed rows are left out, with a message for each on the standard
    error.

    Args:
        path: The file.
        columns: The names of the one or two columns of sentences.

    Raises:
        UserError: The file cannot be read, its first line is not UTF-8 or names other columns, or no row is
            well-formed.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    numbers: list[int] = []
    rows: list[tuple[str, ...]] = []
    malformed: list[str] = []
    places: Sequence[int] | None = None
    for number, line in enumerate(lines, 1):
        try:
            sentences = tuple(line.removesuffix(b"\r").decode().split("\t"))
        except UnicodeDecodeError as error:
            malformed.append(f"{path}, line {number}: not UTF-8 (byte {error.start + 1})")
            if places is None:  # The line may name the columns.
                raise UserError(f"{malformed[-1]}, so the columns are unknown: save the table as UTF-8") from None
            continue
        if sentences == ("",):
            continue
        if places is None:
            header = _header(path, sentences, columns)
            places = header or range(len(columns))
            if header:
                continue
        if len(sentences) != len(columns):
            malformed.append(
                f"{path}, line {number}: {len(sentences)} columns, expected {len(columns)} ({', '.join(columns)})"
            )
            continue
        sentences = tuple(sentences[place] for place in places)
        if empty := [name for name, sentence in zip(columns, sentences, strict=True) if not sentence.strip()]:
            malformed.append(f"{path}, line {number}: {empty[0]} is empty")
        else:
            numbers.append(number)
            rows.append(sentences)
    for complaint in malformed:
        print(complaint, file=sys.stderr)
    if not rows:
        raise UserError(f"{path} has no well-formed row of sentences")
    return Sentences(tuple(numbers), tuple(rows), tuple(malformed))


def _header(path: Path, cells: Sequence[str], columns: Sequence[str]) -> list[int] | None:
    """Return the place of each wanted column if the first line of a table names them, and None if it names none.

    Raises:
        UserError: The line names other columns, has quotes around them, or does not separate them by tabs.
    """
    names = [_name(cell) for cell in cells]
    if sorted(names) == sorted(columns):
        if any('"' in cell for cell in cells):
            raise UserError(
                f"{path}: the first line has quotes around names, but quotes belong to the text here, also those around"
                " sentences: write the table without quotes, as csv.QUOTE_NONE does"
            )
        return [names.index(column) for column in columns]
    parts = [_name(part) for part in re.split(r"[\t,;|]", "\t".join(cells))]
    known = {*columns, *_COLUMNS}
    if known.isdisjoint(names) and not (all(map(str.isidentifier, parts)) and known.intersection(parts)):
        return None
    raise UserError(
        f"{path}: the first line names the columns {', '.join(parts)}, but this task reads {' and '.join(columns)},"
        " separated by a tab: keep only these, under these names (if the line is a row, put a line with the names"
        " above it)"
    )


def _name(cell: str) -> str:
    return cell.strip().strip('"').casefold()
