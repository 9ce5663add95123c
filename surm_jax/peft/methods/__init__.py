"""The fine-tuning methods.

Importing a file of this folder, or of a folder in it, registers its methods. Importing `surm_jax.peft` imports all of
these files.
"""
