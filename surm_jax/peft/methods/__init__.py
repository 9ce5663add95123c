"""The fine-tuning methods.

Importing a file of this folder registers its methods. Importing `surm_jax.peft` imports all of these files.
"""
