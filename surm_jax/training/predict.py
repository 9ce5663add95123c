"""Predictions for new text: a table of sentences in, labels and probabilities out."""

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from surm_jax import data
from surm_jax.devices.mesh import base_sharding, make_mesh, put_batch
from surm_jax.errors import UserError
from surm_jax.files import replacing
from surm_jax.models import Bert
from surm_jax.peft import load_adapter
from surm_jax.pretrained import load, locate
from surm_jax.record.progress import track
from surm_jax.tasks.glue import TextTask, text_model_config, text_tokenizer
from surm_jax.training.config import RunConfig


class Rows(NamedTuple):
    """The rows of a table of sentences that can be read.

    Attributes:
        lines: their line numbers, from 1.
        sentences: of each, one or a pair.
        malformed: what is wrong with the others, each with its line number.
    """

    lines: list[int]
    sentences: list[tuple[str, ...]]
    malformed: list[str]


def read_rows(path: Path, columns: Sequence[str]) -> Rows:
    """Reads a table of sentences: UTF-8, a row a line, columns separated by tabs, quotes without meaning.

    A first line that holds the names of the columns, in any case, is left out; so are empty lines.

    Args:
        path: the file.
        columns: what the sentences of a row are called.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    rows = Rows([], [], [])
    for number, line in enumerate(lines, 1):
        line = line.removesuffix(b"\r")
        try:
            sentences = tuple(line.decode().split("\t"))
        except UnicodeDecodeError as error:
            rows.malformed.append(f"{path}, line {number}: not UTF-8 (byte {error.start + 1})")
            continue
        names = tuple(sentence.strip().casefold() for sentence in sentences)
        if not line or (number == 1 and names == tuple(columns)):
            continue
        if len(sentences) != len(columns):
            rows.malformed.append(
                f"{path}, line {number}: {len(sentences)} columns, expected {len(columns)} ({', '.join(columns)})"
            )
        elif empty := [name for name, sentence in zip(columns, sentences, strict=True) if not sentence.strip()]:
            rows.malformed.append(f"{path}, line {number}: {empty[0]} is empty")
        else:
            rows.lines.append(number)
            rows.sentences.append(sentences)
    return rows


def predict_text(config: RunConfig, adapter: Path, classes: Sequence[str], source: Path, target: Path) -> None:
    """Writes a model's answers to a table of sentences as a table: line number, label, probability of each class.

    Where labels are numbers, there is the number alone. Malformed rows are named on the standard error, and left out.

    Args:
        config: of the run.
        adapter: the folder of what it trained.
        classes: names of the classes; empty where labels are numbers.
        source: the table of sentences, see `read_rows`.
        target: where the answers go; written whole or not at all.

    Raises:
        UserError: if a file cannot be read or written, or no row is well-formed.
    """
    rows = read_rows(source, data.glue_task(config.data.name).columns)
    for line in rows.malformed:
        print(line, file=sys.stderr)
    if not rows.lines:
        raise UserError(f"{source} has no row to predict for")
    # Before the work, and not after it.
    if not target.parent.is_dir():
        raise UserError(f"cannot write {target}: there is no folder {target.parent}")
    if target.is_dir():
        raise UserError(f"cannot write {target}: it is a folder")
    if target.resolve() == source.resolve():
        raise UserError(f"the answers would replace the sentences in {source}: give another --output")
    logits = _logits(config, adapter, max(1, len(classes)), rows.sentences)
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None)
    if classes:
        table.writerow(["line", "label", *classes])
        for line, probabilities in zip(rows.lines, _softmax(logits), strict=True):
            label = classes[int(probabilities.argmax())]
            table.writerow([line, label, *(f"{probability:.6f}" for probability in probabilities)])
    else:
        table.writerow(["line", "score"])
        table.writerows([line, f"{score:.6f}"] for line, score in zip(rows.lines, logits[:, 0], strict=True))
    try:
        with replacing(target) as temporary:
            temporary.write_text(text.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from None
    print(f"{target}: {len(rows.lines)} rows; {len(rows.malformed)} malformed ones were left out")


def _logits(config: RunConfig, adapter: Path, outputs: int, sentences: list[tuple[str, ...]]) -> np.ndarray:
    """Returns the logits of each row, in order."""
    bert = text_model_config(config, outputs)
    checkpoint = locate(config.model.checkpoint)
    tokens = text_tokenizer(checkpoint, bert).encode(
        data.TextSource(sentences, np.zeros(len(sentences), np.int64)), config.data.lengths[-1]
    )
    sizes = {"config.data.eval_batch_size": config.data.eval_batch_size}
    mesh = make_mesh(config.mesh.data, sizes, config.mesh.fsdp)
    with jax.set_mesh(mesh):
        base = load(
            lambda: Bert(bert, rngs=nnx.Rngs(config.seeds[0])),
            checkpoint,
            sharding=lambda path, shape: base_sharding(mesh, shape.shape),
        )
        model, _ = load_adapter(adapter, base, execution=config.peft.execution)
        graphdef, state = nnx.split(model)
        forward = jax.jit(lambda state, batch: TextTask.forward(nnx.merge(graphdef, state), batch, None))
        batches = data.text_eval_batches(tokens, batch_size=config.data.eval_batch_size, lengths=config.data.lengths)
        logits = np.zeros((len(sentences), outputs), np.float32)
        for batch in track(batches, "predict"):
            kept = batch["mask"]
            logits[batch["index"][kept]] = np.asarray(forward(state, put_batch(batch, mesh)))[kept]
    return logits


def _softmax(logits: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.softmax(logits))
