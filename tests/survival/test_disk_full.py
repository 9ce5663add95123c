"""Check that on a full disk the earlier files do not change, and the error message names the path.

Each case runs in two ways, in a process of its own. One writes to a file system of one megabyte that is mounted for it.
The other has a limit on the size of files, at which the kernel refuses to write as it does on a full disk.
"""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
MOUNT = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'

# The program that each case runs. {case} defines three functions: `first` writes something small, `second` writes
# something large when the disk is full, and `third` reads what `first` has written.
PROGRAM = """
import hashlib, os, resource, signal, sys
from pathlib import Path
import jax, jax.numpy as jnp
from flax import nnx
from surm_jax.errors import UserError
folder, mounted = Path(sys.argv[1]), sys.argv[2] == "mounted"

def fill():
    if mounted:
        with open(folder / "filler", "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
    else:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

def contents():
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "filler")
    return {{str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}}

{case}
first()
before = contents()
assert before
fill()
try:
    second()
except (UserError, OSError) as error:
    print("said:", error)
assert contents() == before, (before.keys(), contents().keys())
third()
"""

CASES = {
    "checkpoint": """
from surm_jax.record.checkpoints import Checkpoints
from surm_jax.training.step import TrainState
def save(step):
    arrays = {"kernel": jax.random.normal(jax.random.key(step), (60, 50))}
    Checkpoints(folder / "c", {}, {}).save(TrainState(jnp.array(step, jnp.int32), arrays, {}), {}, 1.0)
def first():
    save(1)
    save(2)
def second():
    save(3)
def third():
    checkpoints = Checkpoints(folder / "c", {}, {})
    template = TrainState(jnp.array(0, jnp.int32), {"kernel": jnp.zeros((60, 50))}, {})
    print("read:", checkpoints.latest, int(checkpoints.restore(template).state.step))
""",
    "adapter": """
from surm_jax.peft import LoRA, Rule, adapt, load_adapter, save_adapter
def net():
    return nnx.Sequential(nnx.Linear(80, 80, rngs=nnx.Rngs(0)))
def save(rank):
    model, adapter = adapt(net(), [Rule(".*", LoRA(rank=rank))], rngs=nnx.Rngs(1))
    save_adapter(folder / "adapter", model, adapter)
def first():
    save(1)
def second():
    save(8)
def third():
    model, adapter = load_adapter(folder / "adapter", net())
    print("read:", adapter.rules[0].method.rank)
""",
    "result": """
from surm_jax.record.workdir import read_result, write_json
def first():
    write_json(folder / "result.json", {"a": 1})
def second():
    write_json(folder / "result.json", {"a": "a" * 5000})
def third():
    print("read:", read_result(folder)["a"])
""",
    "metrics": """
from surm_jax.record.metrics import MetricWriter, read_metrics
def contents():
    return [line for line in read_metrics(folder) if line["step"] == 1]
def first():
    with MetricWriter(folder, 0) as writer:
        writer.write(1, {"loss": 0.5})
def second():
    with MetricWriter(folder, 1) as writer:
        for step in range(2, 2000):
            writer.write(step, {"loss": 0.25})
def third():
    print("read:", contents()[0]["loss"])
""",
}


@functools.cache
def can_mount() -> bool:
    command = ["unshare", "-rm", "sh", "-c", MOUNT, "/mnt", "true"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def run(case: str, folder: Path, mounted: bool) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM.format(case=CASES[case]), str(folder), "mounted" if mounted else "limited"]
    if mounted:
        command = ["unshare", "-rm", "sh", "-c", MOUNT, str(folder), *command]
    # Other tests share the cache of compiled programs, in which a full disk would leave a part of a file.
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "mounted", [pytest.param(True, marks=pytest.mark.exhaustive), False], ids=["mounted", "limited"]
)
@pytest.mark.parametrize(
    ("case", "named", "read"),
    [
        pytest.param("checkpoint", "cannot write the checkpoint {}/c/3: ", "2 2", marks=pytest.mark.exhaustive),
        pytest.param("adapter", "cannot write the adapter folder {}/adapter: ", "1", marks=pytest.mark.exhaustive),
        ("result", "cannot write {}/result.json: ", "1"),
        # Either of the two files may reach the limit first.
        pytest.param("metrics", "cannot write {}/(metrics.jsonl|tensorboard): ", "0.5", marks=pytest.mark.exhaustive),
    ],
)
def test_what_was_there_stays_and_the_path_is_named(case, named, read, mounted, tmp_path):
    if mounted and not can_mount():
        pytest.skip("needs a user namespace to mount a small file system in (unshare -rm)")
    done = run(case, tmp_path, mounted)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout[done.stdout.index("said: ") :].splitlines()
    print(said[0])
    assert re.match("said: " + named.format(re.escape(str(tmp_path))), said[0])
    reason = "No space left on device" if mounted else "File too large"
    assert reason in said[0]
    assert said[-1] == f"read: {read}"
