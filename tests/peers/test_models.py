"""Models of other libraries can be adapted: at least 95 % of their weights, and most at their product."""

import jax
import pytest

from tests.peers.models import MODELS
from tests.peers.trial import trial

BY_PARAMETER = {"tunix qwen3, mixture of experts"}
"""Models whose weights are mostly experts, which they multiply in their own methods."""


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_another_library_is_adapted(name):
    if not MODELS[name].there():
        pytest.skip(f"needs the library {MODELS[name].library}")
    # Others write for JAX's own promotion of dtypes and shapes.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = trial(*MODELS[name].make())
    assert found.product + found.parameter >= 0.95
    assert found.product >= 0.8 or name in BY_PARAMETER
    assert all(found.works.values()), found.works
