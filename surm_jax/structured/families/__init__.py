"""One file a family of matrices. `surm_jax.structured` exports them."""
