"""Sets of texts, their tokenizers and their batches."""
