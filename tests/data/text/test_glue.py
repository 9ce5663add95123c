"""Tests of the tasks of GLUE with small data sets, and with the real ones if they are there."""

import re

import numpy as np
import pytest
import tensorflow_datasets as tfds

from surm_jax.data import GLUE_TASKS, load
from surm_jax.errors import UserError
from tests.data.prepared import write_set
from tests.speeds import fast

RTE = [
    {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0, "idx": 7},
    {"sentence1": "Zoë said „no“ \x12 雨", "sentence2": "", "label": 1, "idx": 3},
]
CLASSES = tfds.features.ClassLabel(names=["entailment", "not_entailment"])


@pytest.fixture
def prepare(tmp_path):
    def prepare(task, splits, label=CLASSES, columns=None, version="2.0.0"):
        texts = {column: tfds.features.Text() for column in columns or GLUE_TASKS[task].columns}
        return write_set(tmp_path, f"glue/{task}", version, {**texts, "label": label, "idx": np.int32}, splits)

    return prepare


@pytest.mark.parametrize("name", ["glue/rte", "glue/rte:2.0.0"])
def test_a_task_is_read_back(prepare, tmp_path, name):
    # The official test split has no labels and must not be read.
    prepare("rte", {"train": RTE, "validation": RTE[1:], "test": [{**RTE[0], "label": -1}]})
    data = load(name, tmp_path)
    assert (data.name, data.classes) == ("glue/rte:2.0.0", ("entailment", "not_entailment"))
    assert (data.columns, data.metrics) == (("sentence1", "sentence2"), ("accuracy",))
    assert data.train.sentences == [("It rains.", "It is wet."), ("Zoë said „no“ \x12 雨", "")]
    np.testing.assert_array_equal(data.train.labels, [0, 1])
    assert data.train.labels.dtype == np.int64
    assert list(data.tests) == ["test"]
    assert data.tests["test"].sentences == data.train.sentences[1:]


def test_single_sentences_are_examples_of_one(prepare, tmp_path):
    rows = [{"sentence": "Fine.", "label": 1, "idx": 0}]
    prepare("sst2", {"train": rows, "validation": rows}, tfds.features.ClassLabel(names=["negative", "positive"]))
    assert load("glue/sst2", tmp_path).train.sentences == [("Fine.",)]


def test_scores_are_floats_without_classes(prepare, tmp_path):
    rows = [{**RTE[0], "label": score} for score in (0.0, 3.8, 5.0)]
    prepare("stsb", {"train": rows, "validation": rows[1:2]}, tfds.features.Scalar(np.float32))
    data = load("glue/stsb", tmp_path)
    assert (data.classes, data.metrics) == ((), ("spearman", "pearson"))
    assert data.train.labels.dtype == np.float32
    np.testing.assert_array_equal(data.train.labels, np.float32([0, 3.8, 5]))


@pytest.mark.parametrize("prepared", [("matched",), ("mismatched",), ("matched", "mismatched")])
def test_mnli_is_tested_on_what_is_prepared(prepare, tmp_path, prepared):
    rows = [{"premise": "a", "hypothesis": "b", "label": 2, "idx": 0}]
    splits = {"train": rows, **{f"validation_{name}": rows for name in prepared}}
    prepare("mnli", splits, tfds.features.ClassLabel(names=["entailment", "neutral", "contradiction"]))
    assert [*load("glue/mnli", tmp_path).tests] == [f"test_{name}" for name in prepared]


@pytest.mark.parametrize(
    ("task", "label", "message"),
    [
        ("rte", -1, r"glue/rte, split train: example 1 has label -1, outside 0 to 1 \(-1 stands for no label\)"),
        ("rte", 2, r"example 1 has label 2, outside 0 to 1$"),
        ("stsb", -1.0, r"example 1 has label -1.0, outside 0 to 5 \(-1 stands for no label\)"),
        ("stsb", 5.5, r"example 1 has label 5.5, outside 0 to 5$"),
        ("stsb", float("nan"), r"example 1 has label nan, outside 0 to 5$"),
    ],
)
def test_an_impossible_label_is_named(prepare, tmp_path, task, label, message):
    rows = [{**RTE[0], "label": type(label)(1)}, {**RTE[0], "label": label}]
    feature = tfds.features.Scalar(np.float32) if isinstance(label, float) else CLASSES
    prepare(task, {"train": rows, "validation": rows[:1]}, feature)
    with pytest.raises(UserError, match=message):
        load(f"glue/{task}", tmp_path)


@pytest.mark.parametrize(
    ("name", "near"), [("glue/rtr", "rte"), ("glue/RTE", "rte"), ("glue/sst-2", "sst2"), ("glue/ax", None), ("glue", 0)]
)
def test_a_mistyped_task_lists_its_neighbours(tmp_path, name, near):
    with pytest.raises(UserError, match=f"'{name}' is not a task of GLUE.* Known are glue/cola, glue/sst2, ") as error:
        load(name, tmp_path)
    assert not near or f"did you mean '{near}'" in str(error.value)


def test_an_unprepared_task_says_where_it_looked_and_how_to_prepare(prepare, tmp_path):
    prepare("rte", {"train": RTE, "validation": RTE})
    with pytest.raises(UserError) as error:
        load("glue/wnli", tmp_path)
    message = str(error.value)
    assert f"not prepared in {tmp_path} (it holds glue/rte:2.0.0" in message
    assert f"tfds build glue/wnli --file_format=array_record --data_dir={tmp_path}" in message
    with pytest.raises(UserError, match=r"holds glue/rte in version 2\.0\.0, not 1\.0\.0"):
        load("glue/rte:1.0.0", tmp_path)


@pytest.mark.parametrize("splits", [("train", "test"), ("validation",)])
def test_labelled_splits_are_needed(prepare, tmp_path, splits):
    prepare("rte", dict.fromkeys(splits, RTE))
    with pytest.raises(UserError, match="needs 'train', and one of 'validation', 'validation_matched'"):
        load("glue/rte", tmp_path)


def test_a_set_with_other_sentences_is_refused(prepare, tmp_path):
    rows = [{"sentence1": "a", "question": "b", "label": 0, "idx": 0}]
    prepare("rte", {"train": rows, "validation": rows}, columns=("sentence1", "question"))
    with pytest.raises(UserError, match="'glue/rte' is not the task of GLUE: it lacks sentence2, its features are"):
        load("glue/rte", tmp_path)


def test_damaged_and_missing_files_are_named(prepare, tmp_path):
    shard = prepare("rte", {"train": RTE, "validation": RTE}) / "glue-train.array_record-00000-of-00001"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match="glue/rte, split train cannot be read, its file is damaged"):
        load("glue/rte", tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=f"'glue/rte' is incomplete: {re.escape(str(shard))} is missing.*tfds build"):
        load("glue/rte", tmp_path)


def test_the_tasks_are_those_that_tensorflow_datasets_prepares():
    official = {config.name: tuple(config.text_features) for config in tfds.text.Glue.BUILDER_CONFIGS}
    # These other tasks have no training examples.
    assert official.keys() - GLUE_TASKS.keys() == {"ax", "mnli_matched", "mnli_mismatched"}
    assert {name: task.columns for name, task in GLUE_TASKS.items()} == {name: official[name] for name in GLUE_TASKS}


# The numbers of training and test examples are those in the table beside the prepared folders, and the names of the
# classes are those in the official files.
REAL = {
    "cola": (8551, {"test": 1043}, ("unacceptable", "acceptable")),
    "sst2": (67349, {"test": 872}, ("negative", "positive")),
    "mrpc": (3668, {"test": 408}, ("not_equivalent", "equivalent")),
    "qqp": (8999, {"test": 1000}, ("not_duplicate", "duplicate")),
    "stsb": (5749, {"test": 1500}, ()),
    "mnli": (8999, {"test_matched": 1000}, ("entailment", "neutral", "contradiction")),
    "qnli": (8999, {"test": 5463}, ("entailment", "not_entailment")),
    "rte": (2490, {"test": 277}, ("entailment", "not_entailment")),
    "wnli": (635, {"test": 71}, ("not_entailment", "entailment")),
}


@pytest.mark.parametrize("task", fast(REAL, "rte"))
def test_the_real_tasks(shared, task):
    data = load(f"glue/{task}", shared / "tfds")
    train, tests, classes = REAL[task]
    assert (len(data.train), {name: len(test) for name, test in data.tests.items()}) == (train, tests)
    assert data.classes == classes
    # `load` reads all examples at once. The result must be the same as reading them one by one.
    builder = tfds.builder_from_directory(shared / "tfds" / "glue" / task / "2.0.0")
    records = builder.as_data_source("train", file_format="array_record")
    for index in (0, 1, train // 2, train - 1):
        record = records[index]
        assert data.train.sentences[index] == tuple(record[column].decode() for column in data.columns)
        assert data.train.labels[index] == np.asarray(record["label"], data.train.labels.dtype)


@pytest.mark.exhaustive
def test_stray_control_characters_stay(shared):
    for task in ("cola", "stsb"):
        sentences = load(f"glue/{task}", shared / "tfds").train.sentences
        assert sum(bool(re.search(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]", " ".join(pair))) for pair in sentences) > 0
