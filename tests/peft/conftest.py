"""Settings of the tests of `surm_jax.peft`."""

# It registers methods when it is imported: only `test_own_method.py` does so, and takes them back.
collect_ignore = ["own_method.py"]
