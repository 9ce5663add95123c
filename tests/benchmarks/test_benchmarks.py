"""The benchmarks run, on sizes at which their numbers mean nothing, and say what they promise."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def run(module, *arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_structured(tmp_path):
    out = tmp_path / "rows.json"
    done = run("structured", f"--out={out}", "--families=circulant", "--sizes=16x8", "--rounds=1")
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert [(row["family"], row["execution"]) for row in rows] == [
        ("frozen", "frozen"),
        *(("low_rank", execution) for execution in ("auto", "fft", "dense", "fused")),
        *(("circulant", execution) for execution in ("auto", "fft", "dense", "fused")),
    ]
    lora = rows[2]
    for row in rows:
        assert (row["width"], row["tokens"], row["dtype"]) == (16, 8, "float32")
        assert row["ms"] > 0 and row["temp_bytes"] >= 0
        assert math.isclose(row["ratio_to_frozen"], row["ms"] / rows[0]["ms"])
        assert math.isclose(row["ratio_to_lora"], row["ms"] / lora["ms"])
        # x, W, dy; y, dx.
        assert row["peak_bytes"] >= 4 * (8 * 16 + 16 * 16 + 8 * 16 + 2 * 8 * 16)
    assert "ratio_to_lora" in done.stdout and "width 16, 8 tokens, float32" in done.stdout


def test_step(tmp_path):
    out = tmp_path / "rows.json"
    done = run("step", f"--out={out}", "--families=circulant", "--variant=digits", "--batch=2", "--rounds=1")
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert [row["family"] for row in rows] == ["frozen", "low_rank", "circulant"]
    assert rows[1]["parameters"] > rows[2]["parameters"] > rows[0]["parameters"] == 0
    assert all(row["ms"] > 0 and row["peak_bytes"] > 0 for row in rows)


def test_peers(tmp_path):
    for name in ("torch", "peft"):
        pytest.importorskip(name, reason="compares with PyTorch: pip install -r requirements-peers.txt")
    out = tmp_path / "rows.json"
    done = run("peers", f"--out={out}", "--width=32", "--tokens=8", "--rounds=1")
    assert done.returncode == 0, done.stderr
    rows = {row["layer"]: row for row in json.loads(out.read_text())}
    peers = {"torch frozen", "torch lora", "torch circulant", "torch toeplitz pair", "peft c3a"}
    assert peers <= rows.keys()
    assert all(rows[name]["ratio_to_ours"] > 0 for name in peers)


@pytest.mark.parametrize("module", ["structured", "step"])
def test_an_unknown_family(module):
    done = run(module, "--families=circulat")
    assert done.returncode != 0
    assert "unknown families circulat" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("module", "flag", "width"), [("structured", "--sizes=768x8,100x8", 100), ("step", "--variant=digits", 64)]
)
def test_a_width_that_a_family_cannot_have(module, flag, width):
    done = run(module, "--families=circulant,block_circulant", flag)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert f"blocks of 128 do not divide both sizes of {width} x {width}" in said
    assert "Traceback" not in said and "tokens, float32" not in said
