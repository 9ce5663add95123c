"""The families of structured matrices. Import their classes from `surm_jax.structured`."""
