"""Load the tasks of GLUE (https://gluebenchmark.com) from folders that TensorFlow Datasets has prepared.

The official test splits have no labels, so the validation splits are used for testing.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from surm_jax.data.prepared import PreparedSet, open_prepared
from surm_jax.data.text.dataset import TextDataset, TextSource
from surm_jax.errors import UserError, did_you_mean


@dataclass(frozen=True)
class GlueTask:
    """The description of a task of GLUE.

    Attributes:
        columns: The name of each sentence in an example, such as ("premise", "hypothesis").
        metrics: The names of the official metrics, the main metric first.
    """

    columns: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)


GLUE_TASKS: Mapping[str, GlueTask] = MappingProxyType(
    {
        "cola": GlueTask(("sentence",), ("matthews",)),
        "sst2": GlueTask(("sentence",)),
        "mrpc": GlueTask(("sentence1", "sentence2"), ("f1", "accuracy")),
        "qqp": GlueTask(("question1", "question2"), ("accuracy", "f1")),
        "stsb": GlueTask(("sentence1", "sentence2"), ("spearman", "pearson")),
        "mnli": GlueTask(("premise", "hypothesis")),
        "qnli": GlueTask(("question", "sentence")),
        "rte": GlueTask(("sentence1", "sentence2")),
        "wnli": GlueTask(("sentence1", "sentence2")),
    }
)
"""The nine tasks of GLUE by name."""

_TESTS = {
    "validation": "test",
    "validation_matched": "test_matched",
    "validation_mismatched": "test_mismatched",
}
_HIGHEST_SCORE = 5  # The highest score in STS-B, the only task whose labels are scores.


def glue_task(name: str) -> GlueTask:
    """Return the description of a task, without reading its data.

    The name of the task is, for example, `glue/rte`, or with a version `glue/rte:2.0.0`.

    Raises:
        UserError: There is no such task.

    >>> glue_task("glue/mnli").columns
    ('premise', 'hypothesis')
    """
    task_name = name.partition(":")[0].removeprefix("glue/")
    if task_name not in GLUE_TASKS:
        near = did_you_mean(task_name.lower(), GLUE_TASKS)
        known = ", ".join(f"glue/{task}" for task in GLUE_TASKS)
        raise UserError(f"{name!r} is not a task of GLUE{near or '.'} Known are {known}")
    return GLUE_TASKS[task_name]


def load_glue(name: str, data_dir: str | os.PathLike[str] | None = None) -> TextDataset:
    """Load a task of GLUE into memory, from the folder that TensorFlow Datasets has prepared.

    This takes two seconds for SST-2.

    Args:
        name: The name of the task, such as `glue/rte` or `glue/rte:2.0.0`, where `rte` is a key of `GLUE_TASKS`.
            Without a version, the newest prepared one is loaded.
        data_dir: The folder of prepared data sets. `None` means `$TFDS_DATA_DIR`, or `~/tensorflow_datasets` if this
            variable is not set.

    Returns:
        The data set of the task. Its `tests` contain one split "test", which is the validation split. For MNLI, they
        contain "test_matched" and "test_mismatched" instead, or only one of these if the other is not prepared. The
        labels of STS-B are scores from 0 to 5.

    Raises:
        UserError: There is no such task, it is not prepared in `data_dir` (the message says how to prepare it), its
            files are missing or damaged, or the label of an example is missing or out of range.
    """
    task = glue_task(name)
    prepared = open_prepared(name, data_dir)
    if absent := [key for key in (*task.columns, "label") if key not in prepared.features]:
        raise UserError(
            f"data set {name!r} is not the task of GLUE: it lacks {', '.join(absent)}, its features are "
            + ", ".join(prepared.features)
        )
    tests = {ours: split for split, ours in _TESTS.items() if split in prepared.splits}
    if "train" not in prepared.splits or not tests:
        raise UserError(
            f"data set {name!r} has the splits {', '.join(prepared.splits)}; it needs 'train', and one of "
            + ", ".join(map(repr, _TESTS))
        )
    label = prepared.features["label"]
    classes = tuple(getattr(label, "names", ()))  # If the labels are scores, there are no names of classes.
    sources = {ours: _read(prepared, split, task, len(classes)) for ours, split in {"train": "train", **tests}.items()}
    return TextDataset(
        prepared.full_name,
        sources.pop("train"),
        sources,
        classes,
        task.columns,
        task.metrics,
        prepared.files(("train", *tests.values())),
    )


def _read(prepared: PreparedSet, split: str, task: GlueTask, num_classes: int) -> TextSource:
    """Read a split of a task into memory. If `num_classes` is 0, the labels are scores."""
    records = prepared.records(split)
    where = f"{prepared.name}, split {split}"
    try:
        rows = records.__getitems__(range(len(records)))  # This is five times as fast as reading them one by one.
    except RuntimeError as error:  # The C++ reader raises it, and opens a file only when a record is read.
        raise UserError(f"{where} cannot be read, its file is damaged ({error})") from error
    labels: np.ndarray = np.array([row["label"] for row in rows], np.int64 if num_classes else np.float32)
    highest = num_classes - 1 if num_classes else _HIGHEST_SCORE
    if (wrong := np.flatnonzero(~((labels >= 0) & (labels <= highest)))).size:
        raise UserError(
            f"{where}: example {wrong[0]} has label {labels[wrong[0]]}, outside 0 to {highest}"
            + (" (-1 stands for no label)" if labels[wrong[0]] == -1 else "")
        )
    sentences = []
    for index, row in enumerate(rows):
        try:
            sentences.append(tuple(row[column].decode() for column in task.columns))
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: example {index} is not UTF-8 text ({error.reason})") from None
    return TextSource(sentences, labels)
