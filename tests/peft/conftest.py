"""Pytest settings for the tests of `surm_jax.peft`."""

# Importing this file registers methods. Only `test_own_method.py` may import it, since it removes them afterwards.
collect_ignore = ["own_method.py"]
