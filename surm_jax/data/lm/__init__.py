"""Data sets of texts, prompts and chats for models that continue text, their tokenizers, and pipelines of batches."""
