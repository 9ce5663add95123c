"""Make the fixtures of the tiny job in tests/training available to the tests of this folder."""

from tests.training.conftest import tiny_files, tiny_variant

__all__ = ["tiny_files", "tiny_variant"]
