"""Data sets of texts, tokenizers, and pipelines that make batches of tokens."""
