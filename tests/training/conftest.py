"""Fixtures of the tiny job (`tests/training/tiny.py`)."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from surm_jax.models import ViTConfig
from tests.training import tiny


# The fixture ends with each module, because tests in other folders check the content of ViTConfig.VARIANTS.
@pytest.fixture(scope="module", autouse=True)
def tiny_variant() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ViTConfig.VARIANTS, tiny.NAME, tiny.GEOMETRY)
        yield


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def built_for(tiny_files: Path) -> Callable[..., tiny.Built]:
    """A function that builds the tiny job for a method and other values of the configuration, each job only once."""
    return functools.cache(lambda method, **overrides: tiny.build(tiny.make_config(tiny_files, method, **overrides)))
