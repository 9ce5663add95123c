import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from surm_jax.versions import OLDEST, require_versions

ROOT = Path(__file__).resolve().parent.parent


def test_the_table_and_the_requirements_agree():
    required = {line.split(">=")[0]: line.split(">=")[1].split(",")[0] for line in lines()}
    assert {name: required[name] for name in OLDEST} == OLDEST


def lines():
    return [line for line in (ROOT / "requirements.txt").read_text().splitlines() if ">=" in line]


@pytest.mark.parametrize("name", OLDEST)
@pytest.mark.parametrize("old", ["0.0.9", "0.1"])
def test_too_old_a_library_is_one_sentence_with_both_versions(monkeypatch, name, old):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda asked: old if asked == name else version(asked))
    with pytest.raises(ImportError) as error:
        require_versions()
    assert str(error.value).startswith(f"surm_jax needs {name} {OLDEST[name]} or newer, but {name} {old} is installed")


def test_the_program_prints_nothing_but_the_sentence(tmp_path):
    (tmp_path / "flax-0.11.0.dist-info").mkdir()
    (tmp_path / "flax-0.11.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: flax\nVersion: 0.11.0\n")
    command = [sys.executable, ROOT / "launch.py", "--mode=describe"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: surm_jax needs flax 0.12.8 or newer, but flax 0.11.0 is installed: pip install 'flax>=0.12.8'\n"
    )
