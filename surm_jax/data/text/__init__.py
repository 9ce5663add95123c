"""Data sets of labelled texts, tokenizers, and pipelines that make batches of tokens."""
