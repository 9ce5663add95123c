"""Test how `choose` uses a table of measurements to choose how a product is computed."""

import json

import jax
import jax.numpy as jnp
import pytest

from surm_jax.structured import FAMILIES, Circulant, LowDisplacementRank, LowRank, Product, Scaled
from surm_jax.structured.products import choice as module
from surm_jax.structured.products.choice import TABLE, choose


def circulant(n):
    return Circulant(jax.ShapeDtypeStruct((n,), jnp.float32), shape=(n, n))


def displacement(n, r):
    leaf = jax.ShapeDtypeStruct((n, r), jnp.float32)
    return LowDisplacementRank(leaf, leaf, shape=(n, n))


def row(family, width, tokens, parameters, execution):
    case = {"family": family, "dtype": "float32", "width": width, "tokens": tokens, "parameters": parameters}
    return {**case, "execution": execution}


@pytest.fixture
def table(monkeypatch, tmp_path):
    rows = [
        row("Circulant", 768, 100, 768, "fft"),
        row("Circulant", 768, 10_000, 768, "fused"),
        row("LowDisplacementRank", 768, 6304, 1536, "fused"),
        row("LowDisplacementRank", 768, 6304, 6144, "dense"),
    ]
    path = tmp_path / "choice.json"
    path.write_text(json.dumps({"cpu": {"device": "a test", "fastest": rows}}))
    monkeypatch.setattr(module, "TABLE", path)
    module._measured.cache_clear()
    yield
    module._measured.cache_clear()


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, "fft"), (1, "fft"), (900, "fft"), (1100, "fused"), (10**6, "fused")]
)
def test_the_nearest_number_of_tokens_counts_in_logarithms(tokens, expected):
    assert choose(circulant(768), tokens, jnp.float32) == expected


@pytest.mark.usefixtures("table")
def test_the_number_of_parameters_counts_and_a_multiple_is_what_it_is_a_multiple_of():
    assert [choose(displacement(768, r), 6304, jnp.float32) for r in (1, 2, 3, 8)] == [
        "fused",
        "fused",
        "dense",
        "dense",
    ]
    assert choose(Scaled(Scaled(displacement(768, 8), jnp.ones(())), 2.0), 6304, jnp.float32) == "dense"


@pytest.mark.usefixtures("table")
def test_what_was_not_measured():
    low_rank = LowRank(jnp.ones((8, 1)), jnp.ones((1, 8)))
    assert choose(low_rank, 100, jnp.float32) == "fft"
    assert choose(circulant(768), 100, jnp.bfloat16) == "dense"
    assert choose(Product((circulant(8), circulant(8))), 100, jnp.float32) == "dense"


def test_the_table_names_families_and_says_on_what_it_was_measured():
    measured = json.loads(TABLE.read_text())
    assert measured.keys() >= {"cpu"}
    for measurement in measured.values():
        assert {"device", "jax", "command"} <= measurement.keys()
        rows = measurement["fastest"]
        assert {r["family"] for r in rows} <= FAMILIES.keys()
        for r in rows:
            allowed = {"fft", "dense", "fused"} if r["dtype"] == "float32" else {"fft", "dense"}
            assert r["execution"] in allowed
