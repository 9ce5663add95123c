"""The choice of the next token: equal to transformers' warpers, and its frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from surm_jax.errors import UserError
from surm_jax.generation.sampling import Sampling, choose, possible
from tests.speeds import fast

LOGITS = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32) * 3
CASES = ((0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.8), (0.8, 10, 0.5), (1.0, 100, 0.01))


@pytest.mark.parametrize("case", fast(CASES, CASES[3]))
def test_possible_tokens_equal_transformers(case):
    pytest.importorskip("transformers", reason="compares with transformers: requirements-peers.txt")
    torch = pytest.importorskip("torch")
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    temperature, top_k, top_p = case
    expected = TemperatureLogitsWarper(temperature)(None, torch.tensor(LOGITS))
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
    found = possible(jnp.asarray(LOGITS), Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
    assert np.isfinite(found).any(1).all()


def test_frequencies_are_the_probabilities():
    sampling = Sampling(temperature=2.0, top_k=3)
    logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1])) * 2
    keys = jax.random.split(jax.random.key(0), 4000)
    found = np.bincount(choose(jnp.tile(logits, (4000, 1)), sampling, keys), minlength=4) / 4000
    np.testing.assert_allclose(found, [4 / 9, 3 / 9, 2 / 9, 0], atol=0.03)


@pytest.mark.parametrize(
    "field", [{"temperature": -1.0}, {"top_k": 1.5}, {"top_p": 0.0}, {"temperature": float("nan")}]
)
def test_values_out_of_range(field):
    with pytest.raises(UserError, match=f"{next(iter(field))} must be"):
        Sampling(**field)
