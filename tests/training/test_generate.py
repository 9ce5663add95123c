"""Tests of `--mode=generate`, which reads JSON lines of prompts and writes JSON lines of answers."""

import json
import shutil

import pytest

from surm_jax.data import load_prompt_tokenizer
from surm_jax.errors import UserError
from surm_jax.generation import generate
from surm_jax.peft import load_adapter
from surm_jax.training.answers import generate_run
from surm_jax.training.modes import merge_run, train_run
from surm_jax.training.parsing import saved_config
from surm_jax.training.setup import prepare
from tests.training import tiny, tiny_lm

LINES = """{"prompt": "3 is"}

{"prompt": 3}
{"messages": [{"role": "user", "content": "Is it wet?"}]}
{"prompt": "4 is the number", "completion": " x"}
{"prompt": "LONG"}
{"prom""".replace("LONG", "blue " * 80)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tiny_lm.write_files(tmp_path_factory.mktemp("lm"))
    settings = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 3, "eos_token_id": 2}
    (folder / "model" / "generation_config.json").write_text(json.dumps(settings))
    (folder / "prompts.jsonl").write_text(LINES)
    return folder


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "lm"
    train_run(tiny_lm.make_config(files, **{"optim.steps": 20, "optim.learning_rate.lora": 0.05}), folder)
    return folder


def answers_of(run, files, target, **options):
    # The data set is not needed.
    generate_run(run, {"data.dir": "/nowhere"}, files / "prompts.jsonl", target, **options)
    return [json.loads(line) for line in target.read_text().splitlines()]


def test_answers_are_those_of_the_adapted_model(run, files, tmp_path, capsys):
    rows = answers_of(run, files, tmp_path / "out.jsonl", temperature=0.0, max_new_tokens=5)
    assert [row["line"] for row in rows] == [1, 4, 5]
    error = capsys.readouterr().err
    for number, words in ((3, "prompt must be text"), (6, "there is room for 59"), (7, "no line break")):
        assert f"line {number}: " in error and words in error
    assert "3 answers; 3 malformed lines were left out" in error
    job = prepare(saved_config(run), 0)
    model, _ = load_adapter(run / "adapter", job.base_model())
    tokenizer = load_prompt_tokenizer(files / "model")
    prompts = [[1, *tokenizer.encode([text])[0].ids] for text in ("3 is", "4 is the number")]
    expected = generate(model, prompts, max_new_tokens=5)
    assert [rows[0]["answer"], rows[2]["answer"]] == [tokenizer.decode(answer.tokens) for answer in expected]
    assert [rows[0]["tokens"], rows[0]["finish"]] == [len(expected[0].tokens), expected[0].finish]


def test_defaults_flags_and_seeds(run, files, tmp_path):
    first = answers_of(run, files, tmp_path / "a")
    assert all(row["tokens"] <= 3 for row in first)
    assert first == answers_of(run, files, tmp_path / "b")
    assert first != answers_of(run, files, tmp_path / "c", seed=1)
    assert answers_of(run, files, tmp_path / "d", top_k=1) == answers_of(run, files, tmp_path / "e", temperature=0.0)


def test_stops_and_streaming(run, files, tmp_path, capsys):
    options = {"temperature": 0.0, "max_new_tokens": 12}
    whole = answers_of(run, files, tmp_path / "a", **options)
    text = whole[0]["answer"]
    assert len(text) > 6
    capsys.readouterr()
    cut = answers_of(run, files, tmp_path / "b", stops=(text[3:6], "never there"), stream=True, **options)
    assert cut[0]["answer"] == text[: text.index(text[3:6])] and cut[0]["finish"] == "stop"
    printed = capsys.readouterr().out
    for row in cut:
        assert f"[line {row['line']}] {row['answer'].rstrip(chr(0xFFFD))}" in printed


def test_the_defaults_travel_with_the_merged_model(run, files):
    (merged,) = merge_run(run, {})
    name = "generation_config.json"
    assert merged.with_name(name).read_bytes() == (files / "model" / name).read_bytes()


def test_mistakes_are_found_before_anything_is_written(run, files, tmp_path):
    source, target = files / "prompts.jsonl", tmp_path / "out.jsonl"
    (tmp_path / "none.jsonl").write_text('{"text": "a"}\n')
    other = tiny_lm.write_files(tmp_path / "other", width=32) if (tmp_path / "other").mkdir() is None else None
    cases = [
        (run, {}, source, {"stops": ("",)}, "--stop is empty"),
        (run, {}, source, {"top_p": 2.0}, "top_p must be"),
        (run, {}, tmp_path / "none.jsonl", {}, "line 1: it has the keys .'text'., but must have either"),
        (run, {}, tmp_path / "nowhere.jsonl", {}, "cannot read"),
        (run, {"model.checkpoint": str(other / "model")}, source, {}, "differ|another|shape|not"),
    ]
    for workdir, overrides, path, options, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            generate_run(workdir, overrides, path, target, **options)
        assert "\n" not in str(caught.value)
    shutil.copytree(files, tmp_path / "copy")
    with pytest.raises(UserError, match="num_beams=2, which cannot be followed"):
        settings = tmp_path / "copy" / "model" / "generation_config.json"
        settings.write_text('{"num_beams": 2}')
        generate_run(run, {"model.checkpoint": str(tmp_path / "copy" / "model")}, source, target)
    assert not target.exists()


def test_a_run_on_images_does_not_write(tiny_files, tmp_path):
    train_run(tiny.make_config(tiny_files, **{"optim.steps": 1}), tmp_path / "run")
    with pytest.raises(UserError, match="continues text, but this run is about images"):
        generate_run(tmp_path / "run", {}, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
