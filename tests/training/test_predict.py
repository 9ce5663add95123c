"""Tests of `--mode=predict`, which reads a table of sentences and writes a table of predictions."""

import csv
import dataclasses

import numpy as np
import pytest

from surm_jax.errors import UserError
from surm_jax.peft import load_adapter
from surm_jax.record.workdir import open_workdir
from surm_jax.tasks.sentences import read_sentences
from surm_jax.training import answers
from surm_jax.training.answers import predict_run
from surm_jax.training.modes import train_run
from surm_jax.training.parsing import complete, saved_config, to_dict
from surm_jax.training.setup import prepare
from tests.training import tiny, tiny_text

PAIRS = [
    ("the cat sleeps", "a dog sings"),
    ("The OLD dog eats and sings .", "the small bird sleeps"),
    ('a "cat" sings', "the dog eats ? not the bird and not the old cat"),
    ("unknown words", "雨 the cat"),
    ("a", "."),
]
COLUMNS = ("sentence1", "sentence2")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny_text.write_files(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "rte"
    values = {"optim.learning_rate.lora": 0.1, "data.eval_batch_size": 2, "data.lengths": (12, 40)}
    train_run(tiny_text.make_config(files, "rte", "lora", **values), folder)
    return folder


def table_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def logits_by_hand(folder, sentences):
    job = prepare(saved_config(folder), 0)
    model, _ = load_adapter(folder / "adapter", job.base_model())
    return tiny_text.logits_one_by_one(model, job.task.checkpoint, sentences).astype(np.float64)


def test_answers_are_those_computed_by_hand(run, tmp_path, capsys):
    source, target = tmp_path / "in.tsv", tmp_path / "out.tsv"
    source.write_text("".join(f"{first}\t{second}\n" for first, second in PAIRS))
    # Predictions do not need the data set, so give a folder that does not exist.
    predict_run(run, {"data.dir": "/nowhere"}, source, target)
    rows = table_of(target)
    assert list(rows[0]) == ["line", "label", "entailment", "not_entailment"]
    assert [row["line"] for row in rows] == ["1", "2", "3", "4", "5"]
    logits = logits_by_hand(run, PAIRS)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    written = np.array([[float(row[name]) for name in ("entailment", "not_entailment")] for row in rows])
    np.testing.assert_allclose(written, probabilities, rtol=0, atol=2e-6)
    assert np.ptp(written[:, 0]) > 1e-3
    assert [row["label"] for row in rows] == [("entailment", "not_entailment")[i] for i in logits.argmax(1)]
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == f"{target}: 5 rows; 0 malformed ones were left out"
    # No temporary file remains.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.tsv", "out.tsv"]


def test_malformed_rows_are_named_and_the_rest_is_answered(run, tmp_path, capsys):
    source, target = tmp_path / "in.tsv", tmp_path / "out.tsv"
    lines = [b"a cat\tthe dog", b"only one column", b"\tthe dog", b"one\ttwo\tthree", b"caf\xe9\tthe dog", b"a\tb"]
    source.write_bytes(b"\n".join(lines))
    predict_run(run, {}, source, target)
    assert [row["line"] for row in table_of(target)] == ["1", "6"]
    said = capsys.readouterr()
    assert [line for line in said.err.splitlines() if "in.tsv" in line] == [
        f"{source}, line 2: 1 columns, expected 2 (sentence1, sentence2)",
        f"{source}, line 3: sentence1 is empty",
        f"{source}, line 4: 3 columns, expected 2 (sentence1, sentence2)",
        f"{source}, line 5: not UTF-8 (byte 4)",
    ]
    assert "2 rows; 4 malformed ones were left out" in said.err


@pytest.mark.parametrize(
    ("content", "lines", "sentences"),
    [
        (b"sentence1\tsentence2\na\tb\n", (2,), (("a", "b"),)),
        (b"\xef\xbb\xbfsentence1\tsentence2\r\na\tb\r\n\r\nc\td\r\n", (2, 4), (("a", "b"), ("c", "d"))),
        (b"\nsentence2\tSentence1\na\tb\nc\td\n", (3, 4), (("b", "a"), ("d", "c"))),
        # Column names are skipped only in the first line. In a later line they are taken as sentences.
        (b"a\tb\nsentence1\tsentence2", (1, 2), (("a", "b"), ("sentence1", "sentence2"))),
        # Quotes have no special meaning. Only a line feed ends a line: other separators (U+2028, \x0b) do not.
        ('"a\t"b" \u2028\x0bc\n'.encode(), (1,), (('"a', '"b" \u2028\x0bc'),)),
    ],
)
def test_tables_are_read(tmp_path, content, lines, sentences):
    (tmp_path / "in.tsv").write_bytes(content)
    read = read_sentences(tmp_path / "in.tsv", COLUMNS)
    assert (read.lines, read.rows, read.malformed) == (lines, sentences, ())
    assert read.count == len(lines)


@pytest.mark.parametrize(
    ("content", "columns", "names"),
    [
        ("index\tsentence\n0\tfine\n", ("sentence",), "index, sentence, but this task reads sentence,"),
        ("index\n0\n", ("sentence",), "index, but this task reads sentence,"),
        ("index,sentence\n0,fine\n", ("sentence",), "index, sentence, but this task reads sentence,"),
        ("question\tsentence\na\tb\n", ("sentence",), "question, sentence, but this task reads sentence,"),
        ("premise\thypothesis\na\tb\n", COLUMNS, "premise, hypothesis, but .* sentence1 and sentence2,"),
        ("sentence1\tsentence1\na\tb\n", COLUMNS, "sentence1, sentence1, but .* sentence1 and sentence2,"),
        ("question,sentence\na,b\n", ("question", "sentence"), "question, sentence, but .* separated by a tab"),
    ],
)
def test_tables_of_other_columns_are_refused(tmp_path, content, columns, names):
    (tmp_path / "in.tsv").write_text(content)
    with pytest.raises(UserError, match=f"in.tsv: the first line names the columns {names}"):
        read_sentences(tmp_path / "in.tsv", columns)


def test_a_table_in_quotes_is_refused_because_they_would_be_read_as_text(tmp_path):
    (tmp_path / "in.tsv").write_text('"sentence1"\t"sentence2"\n"a"\t"b"\n')
    with pytest.raises(UserError, match="the first line has quotes around names"):
        read_sentences(tmp_path / "in.tsv", COLUMNS)


def test_a_table_in_another_encoding_is_refused_because_its_header_cannot_be_read(tmp_path):
    (tmp_path / "in.tsv").write_text("sentence2\tsentence1\na\tb\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"in.tsv, line 1: not UTF-8 \(byte 1\), so the columns are unknown"):
        read_sentences(tmp_path / "in.tsv", COLUMNS)


def test_a_sentence_of_spaces_is_empty(tmp_path):
    (tmp_path / "in.tsv").write_text("  \nfine\n")
    read = read_sentences(tmp_path / "in.tsv", ("sentence",))
    assert read.rows == (("fine",),) and read.malformed == (f"{tmp_path / 'in.tsv'}, line 1: sentence is empty",)


@pytest.mark.exhaustive
def test_scores_are_numbers(files, tmp_path):
    folder = tmp_path / "run"
    values = {"optim.steps": 1, "data.lengths": (20,)}
    train_run(tiny_text.make_config(files, "stsb", "linear_probe", **values), folder)
    (tmp_path / "in.tsv").write_text("sentence1\tsentence2\nthe cat\ta dog\nthe bird sings\tnot\n")
    predict_run(folder, {}, tmp_path / "in.tsv", tmp_path / "out.tsv")
    rows = table_of(tmp_path / "out.tsv")
    assert [list(row) for row in rows] == [["line", "score"]] * 2
    assert [row["line"] for row in rows] == ["2", "3"]
    expected = logits_by_hand(folder, [("the cat", "a dog"), ("the bird sings", "not")])[:, 0]
    np.testing.assert_allclose([float(row["score"]) for row in rows], expected, rtol=0, atol=2e-6)


@pytest.mark.exhaustive
def test_roberta_trains_both_layers_of_its_classifier(files, tmp_path):
    folder = tmp_path / "roberta"
    tiny_text.write_bert(folder, dataclasses.replace(tiny_text.BERT, positions="after_padding"))
    # Train with a seed other than 0. The second layer of the classifier is initialised from this seed.
    values = {"model.checkpoint": str(folder), "optim.learning_rate.lora": 0.1, "seeds": (3,)}
    train_run(tiny_text.make_config(files, "rte", "lora", **values), tmp_path / "run")
    base = prepare(saved_config(tmp_path / "run"), 3).base_model()
    model, adapter = load_adapter(tmp_path / "run" / "adapter", base)
    assert adapter.train == ("head/.*", "pooler/.*")
    assert not np.array_equal(model.pooler.kernel[...], base.pooler.kernel[...])
    source, target = tmp_path / "in.tsv", tmp_path / "out.tsv"
    source.write_text("".join(f"{first}\t{second}\n" for first, second in PAIRS))
    predict_run(tmp_path / "run", {}, source, target)
    logits = tiny_text.logits_one_by_one(model, folder, PAIRS).astype(np.float64)
    expected = 1 / (1 + np.exp(logits[:, 1] - logits[:, 0]))
    answers = [float(row["entailment"]) for row in table_of(target)]
    np.testing.assert_allclose(answers, expected, rtol=0, atol=2e-6)


def test_files_that_will_not_do(run, tmp_path, monkeypatch):
    source = tmp_path / "in.tsv"
    source.write_text("a\tb\n")

    def fail(*_, **__):
        raise AssertionError("nothing is to be loaded for this")

    monkeypatch.setattr(answers, "load_base", fail)
    with pytest.raises(UserError, match=f"cannot read {tmp_path / 'none.tsv'}: No such file"):
        predict_run(run, {}, tmp_path / "none.tsv", tmp_path / "out.tsv")
    with pytest.raises(UserError, match=f"cannot write {tmp_path / 'no' / 'out.tsv'}: there is no folder"):
        predict_run(run, {}, source, tmp_path / "no" / "out.tsv")
    with pytest.raises(UserError, match=f"cannot write {tmp_path}: it is a folder"):
        predict_run(run, {}, source, tmp_path)
    with pytest.raises(UserError, match=f"the output would overwrite the input {source}"):
        predict_run(run, {}, source, tmp_path / "." / "in.tsv")
    assert source.read_text() == "a\tb\n"
    for content in ("", "\n", "sentence1\tsentence2\n", "Sentence1\tSENTENCE2 \n", "one\n"):
        source.write_text(content)
        with pytest.raises(UserError, match=f"{source} has no well-formed row of sentences"):
            predict_run(run, {}, source, tmp_path / "out.tsv")
    assert not (tmp_path / "out.tsv").exists()


def test_runs_that_have_no_answer(files, tiny_files, tmp_path):
    source, target = tmp_path / "in.tsv", tmp_path / "out.tsv"
    source.write_text("a\tb\n")
    runs = {
        "seeds": (tiny_text.make_config(files, seeds=(3, 4)), "a run for each of 2 seeds: choose one, .*seeds/seed-3"),
        "begun": (tiny_text.make_config(files), "the run in .*begun is not complete"),
        "image": (
            tiny.make_config(tiny_files),
            "reads sentences, but this run is about images .*npz",
        ),
    }
    for name, (config, message) in runs.items():
        with open_workdir(tmp_path / name, to_dict(config), complete):
            pass
        with pytest.raises(UserError, match=message):
            predict_run(tmp_path / name, {}, source, target)
    with pytest.raises(UserError, match="no run in"):
        predict_run(tmp_path / "none", {}, source, target)
    with pytest.raises(UserError, match="belongs to the run"):
        predict_run(tmp_path / "begun", {"data.name": "glue/cola"}, source, target)
