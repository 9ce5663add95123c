"""The tiny job of tests/training."""

from tests.training.conftest import tiny_files, tiny_variant

__all__ = ["tiny_files", "tiny_variant"]
