"""The methods. Importing a file of this folder registers the methods in it; `surm_jax.peft` imports all of them."""
