"""Tests of the regular expressions that select paths, and of the messages when they match no path."""

import re
import time

import pytest

from surm_jax.errors import UserError
from surm_jax.models import TARGETS
from surm_jax.paths import compile_pattern, join, matching, no_match_message, require_match

LAYERS = [f"blocks/{i}/{name}" for i in range(12) for name in ("attention/query", "attention/value", "mlp/up")]


def test_join_writes_every_kind_of_key():
    assert join(("blocks", 0, "query", "kernel")) == "blocks/0/query/kernel"
    assert join(()) == ""


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (r"blocks/1/mlp/up", ["blocks/1/mlp/up"]),
        (r"blocks/1", []),  # The pattern matches only the beginning of paths.
        (r"mlp/up", []),  # The pattern matches only the end of paths.
        (r"blocks/1/.*", LAYERS[3:6]),
        (r".*/query|.*/up", [path for path in LAYERS if path.endswith(("query", "up"))]),
        (r"blocks/.", []),
    ],
)
def test_matching_takes_whole_paths_in_their_order(pattern, found):
    assert matching(pattern, LAYERS) == found


@pytest.mark.parametrize("pattern", ["blocks/(", "*", "[a"])
def test_an_invalid_pattern_is_named(pattern):
    with pytest.raises(UserError, match="is not a regular expression") as error:
        compile_pattern(pattern)
    assert repr(pattern) in str(error.value)


QUERY = "blocks/0/attention/query/kernel"
SLOW = [
    "(a*)*b",
    "(.*)*x",
    r"(\w+/)*kernel",
    "(a|a)" * 30 + "b",
    "a?" * 30 + "a" * 30,
    ".*" * 10 + "x",
    "(?:a{0,9}){9}b",
    "(?=((a*)*b))",
    "x(?>(a+)+)",
    "(a)?(?(1)(b*)*|c)",
    "(a|a)" * 21 + "x",
    ".*.*.*.*(a|a|a|a|a|.)x",
]


@pytest.mark.parametrize("pattern", SLOW)
def test_a_pattern_that_could_take_years_takes_seconds(pattern):
    start = time.process_time()
    for path in ("a" * 60, QUERY):
        try:
            matches = compile_pattern(pattern).matches(path)
            assert matches == ((pattern, path) in (("a?" * 30 + "a" * 30, "a" * 60), (SLOW[2], QUERY)))
        except UserError as error:
            assert "takes very long to match" in str(error) and repr(pattern) in str(error)
    assert time.process_time() - start < 20


def test_a_match_that_takes_long_is_refused():
    with pytest.raises(UserError, match="takes very long to match"):
        matching("(a|a)" * 30 + "b", ["a" * 60])


def test_a_pattern_has_a_length():
    with pytest.raises(UserError, match="at most 65,536 characters, got 70,000"):
        compile_pattern("a" * 70_000)


@pytest.mark.parametrize("pattern", ["(" * 3000 + ")" * 3000, "a{99999999999999}"])
def test_what_the_compiler_of_patterns_trips_over_is_named(pattern):
    with pytest.raises(UserError, match="is not a regular expression"):
        compile_pattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        *TARGETS.values(),
        r"(.*/)?blocks/(\d|1[01])/(attention/)?(query|key|value|out)/(kernel|bias)",
        r".*blocks/\d+/.*/(query|value)",
        r"(?:.*/)?norm\d?/.*|head/.*|.*/b[a-z]*s",
        r"blocks/\d{1,2}/(?!mlp).*",
        "|".join(rf"blocks/\d+/layer_{i}/.*" for i in range(200)),
    ],
)
def test_patterns_that_people_write_match_as_in_re(pattern):
    paths = [*LAYERS, "blocks/3/layer_7/kernel", "blocks/11/attention/query/bias", "norm/scale", "head/kernel"]
    assert matching(pattern, paths) == [path for path in paths if re.fullmatch(pattern, path)]


@pytest.mark.parametrize("pattern", [None, 3, ("head",)])
def test_a_pattern_is_a_string(pattern):
    with pytest.raises(UserError, match="must be a string"):
        compile_pattern(pattern)


def test_require_match_returns_what_matches():
    assert require_match(r".*/0/.*", LAYERS, "layer") == LAYERS[:3]


def test_a_miss_shows_the_nearest_path_first():
    with pytest.raises(UserError, match="matches no layer") as error:
        require_match(r"blocks/\d+/attention/qurey", LAYERS, "layer")
    shown = str(error.value).split(f"nearest of {len(LAYERS)}: ")[1].split(", ")
    assert shown[0] == "blocks/0/attention/query"


def test_a_miss_shows_each_repeated_layer_once():
    shown = no_match_message("nothing_like_it", LAYERS, "layer").split(": ")[-1].split(", ")
    assert sorted(shown) == sorted(LAYERS[:3])


def test_a_miss_in_a_model_without_candidates_says_so():
    assert no_match_message("head", [], "linear layer").endswith("the model has none")
