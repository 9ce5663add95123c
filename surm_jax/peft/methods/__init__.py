"""The fine-tuning methods. Importing a file of this folder registers its methods; `surm_jax.peft` imports all files."""
