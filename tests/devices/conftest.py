"""Fixtures that provide the tiny job of tests/training to the tests of this folder."""

from tests.training.conftest import tiny_files, tiny_variant

__all__ = ["tiny_files", "tiny_variant"]
