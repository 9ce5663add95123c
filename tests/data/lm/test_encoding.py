"""Test which tokens of a line are learned, and which lines are refused."""

import numpy as np
import pytest

from surm_jax.data.lm.encoding import encode_lines
from surm_jax.data.lm.lines import Line, LineSource
from surm_jax.data.lm.tokenizer import load_prompt_tokenizer
from surm_jax.errors import UserError
from tests.data.lm.chats import CHAT, MARKED, PLAIN, write_tokenizer

START, END = 1, 2


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    return lambda template=PLAIN: load_prompt_tokenizer(write_tokenizer(tmp_path_factory.mktemp("t"), template))


def line(number=1, **values):
    form = next(form for form in ("text", "prompt", "messages") if form in values)
    return Line(f"a.jsonl, line {number}", form, values)


def encode(tokenizer, *lines, max_length=200, **options):
    return encode_lines(tokenizer, LineSource(tuple(lines)), max_length=max_length, end=END, **options)


def words(tokenizer, source):
    """Return the text that is learned and the text that is only read, each as a list of uninterrupted pieces."""
    cuts = np.flatnonzero(np.diff(source.learned)) + 1
    runs = np.split(source.tokens, cuts)
    texts = [tokenizer._library.decode(run.tolist(), skip_special_tokens=False) for run in runs]
    first = int(not source.learned[0])
    return texts[first::2], texts[1 - first :: 2]


@pytest.mark.parametrize(
    ("values", "learned", "read"),
    [
        ({"text": "It rains."}, ["It rains.</s>"], ["<s>"]),
        ({"text": "<s>It rains.</s>"}, ["It rains.</s>"], ["<s>"]),
        ({"prompt": "Is it wet?", "completion": " It rains."}, [" It rains.</s>"], ["<s>Is it wet?"]),
        ({"prompt": "<s>Is it", "completion": " wet?</s>"}, [" wet?</s>"], ["<s>Is it"]),
        ({"prompt": "", "completion": "wet"}, ["wet</s>"], ["<s>"]),
    ],
)
def test_texts_and_completions(load, values, learned, read):
    tokenizer = load()
    source = encode(tokenizer, line(**values))
    found = words(tokenizer, source)
    if "text" in values and values["text"].startswith("<s>"):
        found = ([found[0][0].removeprefix("<s>")], ["<s>"])
    assert found == (learned, read)
    assert (source.tokens == START).sum() == 1


def test_the_answers_of_a_chat_are_learned(load):
    for template, ending in ((MARKED, ""), (PLAIN, "\n")):
        tokenizer = load(template)
        learned, read = words(tokenizer, encode(tokenizer, line(messages=CHAT)))
        assert learned == [f"It rains.<|e|>{ending}", f"It pours. Zoë<|e|>{ending}"]
        assert read[0] == "<s><|u|>Is it  wet?<|e|>\n<|a|>"


def test_the_end_is_added_to_a_chat_that_has_none(load):
    tokenizer = load(PLAIN.replace("<|e|>", ""))
    learned, _ = words(tokenizer, encode(tokenizer, line(messages=CHAT)))
    assert [text.count("</s>") for text in learned] == [0, 1]
    # A chat that ends with a question ends nothing.
    learned, _ = words(tokenizer, encode(tokenizer, line(messages=CHAT[:3])))
    assert [text.count("</s>") for text in learned] == [0]


# This template writes only the last answer as it is, so that earlier answers are no beginning of a longer chat.
FORGETS = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '-' }}{% endfor %}"
BAD = {
    "changes": (PLAIN, {"prompt": "It ra", "completion": "ins"}, "tokens of the prompt change when the completion"),
    "forgets": (FORGETS, {"messages": CHAT}, "tokens of the messages before an answer change"),
    "long": (PLAIN, {"prompt": "It rains. " * 30, "completion": "wet"}, r"prompt has \d+ tokens, but .* ends with 40"),
    "half": (PLAIN, {"text": "a\ud800"}, "surrogates not allowed"),
    "raises": ("{{ raise_exception('no') }}", {"messages": CHAT}, "cannot render the messages: no"),
    "silent": ("{{ 'nothing' }}", {"messages": CHAT}, "no tokens: there is nothing to learn"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_unusable_line_is_named_and_counted(load, case):
    template, values, message = BAD[case]
    tokenizer, good = load(template), line(3, text="It rains.")
    with pytest.raises(UserError, match=f"a.jsonl, line 7: .*{message}.*max_corrupt lets 0") as caught:
        encode(tokenizer, good, line(7, **values), max_length=40)
    assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match="line 7"):
        source = encode(tokenizer, good, line(7, **values), good, max_length=40, max_corrupt=1)
    assert (len(source), len(source.skipped)) == (2, 1)


def test_messages_without_a_template_are_refused(load):
    with pytest.raises(UserError, match=r"line 1 has messages, but the tokenizer in .* has no chat template"):
        encode(load(None), line(messages=CHAT), max_corrupt=5)


def test_truncation_is_counted_and_said(load):
    lines = [line(text="It rains. " * count) for count in (1, 30, 40)]
    with pytest.warns(UserWarning, match="2 of 3 examples are longer than 20 tokens"):
        source = encode(load(), *lines, max_length=20)
    assert source.truncated == 2
    assert source.lengths.max() == 20
