"""Settings of the whole suite: 8 CPU devices, strict promotion, no network."""

import os
import socket
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the suite's time is compilation, a third of which goes into machine code that runs once.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

from surm_jax.models import ViTConfig

jax.config.update("jax_num_cpu_devices", 8)
# Many tests compile the same small programs. Each is compiled once a run: the processes that share the work inherit the
# folder from the one that started them, which removes it.
if "SURM_JAX_TESTS_COMPILED" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory(prefix="surm_jax-compiled-")
    os.environ["SURM_JAX_TESTS_COMPILED"] = _COMPILED.name
jax.config.update("jax_compilation_cache_dir", os.environ["SURM_JAX_TESTS_COMPILED"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data sets beside the checkout; tests that need it are skipped by name without it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the data folder {SHARED}")
    return SHARED


@pytest.fixture
def x64():
    """Doubles for the mathematics, in this test alone."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def _own_variants(monkeypatch):
    """Forget the variants that a test adds. The configuration of the tiny job adds one wherever it is read."""
    monkeypatch.setattr(ViTConfig, "VARIANTS", dict(ViTConfig.VARIANTS))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Any attempt to leave the machine fails the test at once instead of hanging."""

    def refuse(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"the tests use no network, but something connects to {address}")
        return connect(self, address)

    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)


def pytest_terminal_summary(terminalreporter, config):
    """Say how to run what the fast run leaves out."""
    if config.option.markexpr == "not exhaustive":
        terminalreporter.write_line("This was the fast run. python -m pytest -m '' runs the exhaustive tests too.")
