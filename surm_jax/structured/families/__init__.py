"""Families of structured matrices, one per file. `surm_jax.structured` exports them."""
