"""Check that runs which are killed at random moments and resumed end with the results of a run that never stopped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training import tiny

ROOT = Path(__file__).resolve().parent.parent.parent
CHAINS, KILLS, STEPS, SEED = 2, 10, 24, 20


@pytest.mark.exhaustive
def test_twenty_kills_change_no_bit_of_the_end(tmp_path):
    tiny.write_files(tmp_path)
    # All starts share one cache of compiled programs, as on a user's machine.
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    arguments = [tmp_path, CHAINS, KILLS, STEPS, SEED]
    command = [sys.executable, "-m", "tests.survival.kills", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    logs = "".join(path.read_text()[-2000:] for path in tmp_path.glob("log-of-*"))
    assert done.returncode == 0, done.stderr + logs
    print(done.stdout)
    kills = [line for line in done.stdout.splitlines() if ", kill " in line]
    assert len(kills) == CHAINS * KILLS
    assert any("while it wrote" in line for line in kills)
    runs = [*tmp_path.glob("killed-*"), *tmp_path.glob("complete-*")]
    assert len(runs) >= CHAINS
    for run in runs:
        tiny.assert_same_run(tmp_path / "whole", run)
        assert not [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
        assert not (run / ".lock").exists()
