"""Pytest settings for the tests of `surm_jax.peft`."""

# Importing `own_method.py` registers its methods. Only `test_own_method.py` does so, and unregisters them afterwards.
collect_ignore = ["own_method.py"]
