import jax.numpy as jnp

from surm_jax.peft import adapter_of_examples
from surm_jax.peft.parts.banked import example_adapters


def test_the_adapters_of_examples():
    assert example_adapters() is None
    ids = jnp.array([2, 0])
    with adapter_of_examples(ids):
        assert example_adapters() is ids
    assert example_adapters() is None
