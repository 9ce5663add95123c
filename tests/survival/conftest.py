"""The tiny job of the training room."""

from tests.training.conftest import tiny_files, tiny_variant

__all__ = ["tiny_files", "tiny_variant"]
