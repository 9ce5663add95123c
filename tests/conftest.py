"""Settings for all tests: 8 CPU devices, strict promotion of dtypes, and no network."""

import json
import os
import socket
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the suite's time is compilation, a third of which goes into machine code that runs once.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Many tests compile the same small programs. Each is compiled once a run: all processes inherit the folder from the one
# that started them, which removes it. A folder that the user names is kept for the next run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory(prefix="surm_jax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

from surm_jax.models import ViTConfig

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data sets next to the repository. Without it, the test is skipped."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the data folder {SHARED}")
    return SHARED


@pytest.fixture
def x64():
    """Allow float64 in JAX during this test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def _own_variants(monkeypatch):
    """Remove the variants (named sizes) that a test adds to `ViTConfig`, as the configuration of the tiny job does."""
    monkeypatch.setattr(ViTConfig, "VARIANTS", dict(ViTConfig.VARIANTS))


@pytest.fixture(autouse=True)
def _own_states(monkeypatch, tmp_path_factory):
    """Keep the files of stored states in the temporary folder of the tests."""
    if module := sys.modules.get("surm_jax.training.states"):
        monkeypatch.setattr(module, "cache_root", tmp_path_factory.getbasetemp)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Make every attempt to connect to another machine fail at once."""

    def refuse(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"the tests use no network, but something connects to {address}")
        return connect(self, address)

    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)


def pytest_runtest_logreport(report):
    """Write the name of a passed test into the file $SURM_JAX_TESTS_PASSED_TO, if this variable is set."""
    if (path := os.environ.get("SURM_JAX_TESTS_PASSED_TO")) and report.when == "call" and report.passed:
        with open(path, "a") as file:
            file.write(json.dumps(report.nodeid) + "\n")


def pytest_collection_modifyitems(config, items):
    """Leave out the tests that the file $SURM_JAX_TESTS_PASSED lists, if this variable is set."""
    if path := os.environ.get("SURM_JAX_TESTS_PASSED"):
        passed = set(map(json.loads, Path(path).read_text().splitlines()))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]


def pytest_terminal_summary(terminalreporter, config):
    """Print how to run the tests that the fast run leaves out."""
    if config.option.markexpr == "not exhaustive":
        terminalreporter.write_line("This was the fast run. python -m pytest -m '' runs the exhaustive tests too.")
