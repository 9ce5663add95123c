"""Pytest settings for the tests of `surm_jax.peft`."""

# Importing `own_method.py` registers methods. Only `test_own_method.py` imports it, and removes them afterwards.
collect_ignore = ["own_method.py"]
