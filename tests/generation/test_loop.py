"""The loop that writes token after token: equal to transformers, in any batch, with any padding, with a bank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.data import load_prompt_tokenizer
from surm_jax.errors import UserError
from surm_jax.generation import Sampling, generate, loop
from surm_jax.models.decoder import Decoder
from surm_jax.models.decoder_config import DecoderConfig
from surm_jax.peft import CirculantUpdate, Rule, adapt, load_adapter, load_bank, save_adapter
from surm_jax.pretrained import from_pretrained
from tests.speeds import fast
from tests.training import tiny_lm

NAMES = ("Lily", "Tom", "Ben", "Sue", "a girl")
TEXTS = [
    text
    for name in NAMES
    for text in (
        f"Once upon a time, {name}",
        f"{name} saw a dog.",
        f"One day, {name} went to the park with mom. They saw a",
        f"Once upon a time there was {name} who lived in a big house near the sea and had many friends. {name}",
    )
]
PROMPTS = [[5, 6, 7], [9] * 20, [11, 12, 13, 14], [3]]


@pytest.fixture(scope="module")
def stories(shared):
    folder = shared / "data/weights/stories260k"
    return from_pretrained(folder), load_prompt_tokenizer(folder)


@pytest.fixture(scope="module")
def model():
    return noisy(Decoder(DecoderConfig(**tiny_lm.GEOMETRY), rngs=nnx.Rngs(0)), 0, 0.3)


def noisy(model, seed, size):
    rng = np.random.default_rng(seed)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable[...] += jnp.asarray(size * rng.normal(size=variable.shape), variable.dtype)
    return model


def rows(tokenizer, texts):
    return [[*tokenizer.start, *encoding.ids] or [1] for encoding in tokenizer.encode(texts)]


def greedy(model, prompt, new):
    """The same without a cache and without a loop on the device.

    The zeros after the text change nothing: no token sees a later one.
    """
    logits = nnx.jit(lambda model, tokens: model(tokens)[0])
    tokens = list(prompt)
    for _ in range(new):
        padded = jnp.asarray([tokens + [0] * (32 - len(tokens))], jnp.int32)
        tokens.append(int(logits(model, padded)[len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.exhaustive
def test_greedy_equals_transformers_for_20_prompts_batched_and_alone(shared, stories):
    transformers = pytest.importorskip("transformers", reason="compares with transformers: requirements-peers.txt")
    torch = pytest.importorskip("torch")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(shared / "data/weights/stories260k")
    model, tokenizer = stories
    prompts = [[1, *row] if row[0] != 1 else row for row in rows(tokenizer, TEXTS)]
    assert len(prompts) == 20 and len({len(prompt) for prompt in prompts}) > 5
    expected = []
    for prompt in prompts:
        found = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=0)
        expected.append([token for token in found[0, len(prompt) :].tolist() if token != 2])
    batched = generate(model, prompts, max_new_tokens=40)
    assert [answer.tokens for answer in batched] == expected
    alone = [generate(model, [prompt], max_new_tokens=40, batch_size=1)[0] for prompt in prompts]
    assert alone == batched


def test_a_real_llama_tells_a_story(stories):
    model, tokenizer = stories
    prompt = [1, *tokenizer.encode(["Once upon a time, there was a"])[0].ids]
    ends = lambda _, tokens: tokenizer.decode(tokens).endswith("Lily.")  # noqa: E731
    (answer,) = generate(model, [prompt], max_new_tokens=40, batch_size=1, stop=ends)
    assert tokenizer.decode([*prompt, *answer.tokens]) == "Once upon a time, there was a little girl named Lily."
    assert answer.finish == "stop"


def test_the_cache_batches_and_padding_change_nothing(model):
    expected = [greedy(model, prompt, 6) for prompt in PROMPTS]
    seen = []
    answers = generate(
        model, PROMPTS, max_new_tokens=6, batch_size=3, watch=lambda index, new: seen.append((index, new[-1]))
    )
    assert [answer.tokens for answer in answers] == expected
    assert {answer.finish for answer in answers} == {"length"}
    assert [[token for index, token in seen if index == row] for row in range(4)] == expected
    for side in (0, 1):
        padded, mask = np.zeros((2, 4, 24), np.int32)
        for row, prompt in enumerate(PROMPTS):
            place = slice(0, len(prompt)) if side else slice(24 - len(prompt), 24)
            padded[row, place], mask[row, place] = prompt, 1
        assert generate(model, padded, mask=mask.astype(bool), max_new_tokens=6, batch_size=3) == answers


def test_end_tokens_and_stop_end_only_their_own_row(model):
    whole = [answer.tokens for answer in generate(model, PROMPTS, max_new_tokens=8, end_tokens=())]
    end = whole[0][3]
    for answer, tokens in zip(generate(model, PROMPTS, max_new_tokens=8, end_tokens=(end,)), whole, strict=True):
        place = tokens.index(end) if end in tokens else 8
        assert answer == (tokens[:place], "end" if place < 8 else "length")
    second = lambda index, tokens: index == 1 and len(tokens) == 2  # noqa: E731
    stopped = generate(model, PROMPTS, max_new_tokens=8, end_tokens=(), stop=second)
    assert [(answer.tokens, answer.finish) for answer in stopped] == [
        (tokens[:2], "stop") if row == 1 else (tokens, "length") for row, tokens in enumerate(whole)
    ]


def test_random_choices_depend_on_seed_and_place_only(model):
    def tokens(seed, **options):
        sampling = Sampling(temperature=1.5, top_k=30, top_p=0.95)
        return generate(model, PROMPTS, max_new_tokens=6, sampling=sampling, seed=seed, end_tokens=(), **options)

    assert tokens(0) == tokens(0, batch_size=2) == tokens(0, watch=lambda *_: None)
    assert tokens(0) != tokens(1)
    same = generate(model, [PROMPTS[0]] * 4, max_new_tokens=6, sampling=Sampling(temperature=2.0), end_tokens=())
    assert len({tuple(answer.tokens) for answer in same}) == 4


def test_one_compilation_for_each_length(model):
    loop._write.clear_cache()
    for prompts in ([[5] * 3], [[6] * 9, [7] * 2], [[8] * 17], [[9] * 3, [4] * 30]):
        generate(model, prompts, max_new_tokens=5, batch_size=2)
    assert loop._write._cache_size() == 2


@pytest.mark.parametrize("method", fast((CirculantUpdate(),)))
def test_a_bank_gives_every_prompt_its_own_adapter(model, tmp_path, method):
    folders, expected = [], []
    for number in range(4):
        adapted, adapter = adapt(model, [Rule("qkv", method)], rngs=nnx.Rngs(number))
        rng = np.random.default_rng(number)
        for _, variable in nnx.to_flat_state(nnx.state(adapted, adapter.trainable)):
            variable[...] = jnp.asarray(rng.normal(size=variable.shape) / 3, variable.dtype)
        folders.append(tmp_path / str(number))
        save_adapter(folders[-1], adapted, adapter)
        alone = load_adapter(folders[-1], model)[0]
        expected.append(generate(alone, [PROMPTS[0]], max_new_tokens=6, end_tokens=())[0])
    assert len({tuple(answer.tokens) for answer in expected}) > 1
    order = [2, 0, 3, 1]
    bank = load_bank(folders, model)
    answers = generate(bank, [PROMPTS[0]] * 4, adapters=order, max_new_tokens=6, end_tokens=())
    assert answers == [expected[number] for number in order]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 must be a list of at least one token"),
        ([[1, 400]], {}, "prompt 0 holds a token outside 0 to 399"),
        ([[1] * 60], {}, "prompt 0 has 60 tokens, and 5 new ones .* more than the 64"),
        ([[1]], {"batch_size": 0}, "batch_size must be"),
        ([[1]], {"adapters": [0, 1]}, "adapters must name one adapter for each of the 1 prompts"),
        ([[1]], {"mask": np.ones((2, 2), bool)}, "mask must have the shape"),
    ],
)
def test_bad_input_is_one_line(model, prompts, options, message):
    with pytest.raises(UserError, match=message):
        generate(model, prompts, max_new_tokens=5, **options)


def test_nothing_is_asked(model):
    assert generate(model, [], max_new_tokens=5) == []
    assert jax.device_count() >= 1
