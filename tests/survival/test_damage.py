"""Check that damage to any file of a checkpoint or an adapter gives an error that names the folder.

For a checkpoint, the error also names the earlier checkpoint from which the run can resume.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.devices.mesh import make_mesh, replicated
from surm_jax.errors import UserError
from surm_jax.peft import CirculantUpdate, Rule, adapt, load_adapter, save_adapter
from surm_jax.record.checkpoints import Checkpoints
from surm_jax.training.step import TrainState
from tests.training.tiny import assert_equal_bits, host

BASE, CONFIG, PLACE = {"kernel": "0123456789abcdef"}, {"seeds": (0,)}, {"next": 3}
REGIONS = 12


def state_at(step: int, seed: int = 0) -> TrainState:
    trained = {"head/kernel": jax.random.normal(jax.random.key(100 * seed + step), (7, 3))}
    state = TrainState(jnp.array(step, jnp.int32), trained, jax.tree.map(jnp.zeros_like, trained))
    return jax.device_put(state, replicated(make_mesh(0, {})))


def write_checkpoints(folder: Path, seed: int) -> Path:
    checkpoints = Checkpoints(folder, BASE, {"seeds": (seed,)})
    for step in (1, 2):
        checkpoints.save(state_at(step, seed), PLACE, float(step), None)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """The folders of the checkpoints of two runs that differ only in their seed."""
    folder = tmp_path_factory.mktemp("runs")
    return write_checkpoints(folder / "one", 0), write_checkpoints(folder / "other", 1)


def damaged(content: bytes, other: bytes | None) -> Iterator[tuple[str, bytes | None]]:
    """Yield descriptions of damage to a file, each with the damaged content (None if the file is deleted).

    The file is cut off, one bit is flipped, a part is overwritten with zeros, a byte is appended, or the file is
    deleted or replaced.

    Args:
        content: The content of the file.
        other: The content of the same file of another run, or None if there is no such file.
    """
    for region in range(REGIONS):
        place = region * len(content) // REGIONS
        if place < len(content):
            yield f"cut off after {place} bytes", content[:place]
            flipped = bytearray(content)
            flipped[place] ^= 1 << region % 8
            yield f"bit {region % 8} of byte {place} flipped", bytes(flipped)
            block = slice(place, (region + 1) * len(content) // REGIONS)
            blank = content[: block.start] + bytes(block.stop - block.start) + content[block.stop :]
            if blank != content:
                yield f"bytes {block.start} to {block.stop} zero", blank
    yield "longer", content + b"\0"
    yield "gone", None
    if other is not None and other != content:
        yield "another run's", other


def put(path: Path, content: bytes | None) -> None:
    path.unlink() if content is None else path.write_bytes(content)


def files_of(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


@pytest.mark.exhaustive
def test_every_region_of_every_file_of_a_checkpoint(runs, tmp_path):
    one, other = runs
    shutil.copytree(one, tmp_path / "c")
    names, count = files_of(one / "2"), 0
    # Orbax gives some files random names. Find the files of the other run by their folder instead.
    others = dict(zip(map(_kind, files_of(other / "2")), files_of(other / "2"), strict=False))
    for name in names:
        path = tmp_path / "c" / "2" / name
        content = path.read_bytes()
        theirs = others.get(_kind(name))
        for what, changed in damaged(content, theirs and (other / "2" / theirs).read_bytes()):
            put(path, changed)
            with pytest.raises(UserError) as error:
                Checkpoints(tmp_path / "c", BASE, CONFIG)
            said = str(error.value)
            assert f"the checkpoint {tmp_path / 'c' / '2'} is damaged" in said, (name, what)
            assert said.endswith("delete that folder to go on from step 1"), (name, what)
            # The message names the damaged file. The exception is `checkpoint.json` of another run, which is intact.
            # Then the message names another file that does not fit it.
            assert name.name in said or (name.name, what) == ("checkpoint.json", "another run's"), (name, what)
            count += 1
        path.write_bytes(content)
    print(f"{count} kinds of damage to {len(names)} files: all refused")
    assert count > 20 * len([name for name in names if (one / "2" / name).stat().st_size >= REGIONS])
    # The undamaged checkpoint can be read. If it is deleted, the previous one is read.
    assert_equal_bits(host(Checkpoints(tmp_path / "c", BASE, CONFIG).restore(state_at(0)).state), host(state_at(2)))
    shutil.rmtree(tmp_path / "c" / "2")
    assert_equal_bits(host(Checkpoints(tmp_path / "c", BASE, CONFIG).restore(state_at(0)).state), host(state_at(1)))


def _kind(name: Path) -> str:
    return str(name.parent) if name.parent.name == "d" else str(name)


def test_a_file_too_many_is_refused(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "c")
    (tmp_path / "c" / "2" / "arrays" / "state" / "extra").write_bytes(b"")
    with pytest.raises(UserError, match=r"c/2 is damaged \(arrays/state/extra does not belong to it\)"):
        Checkpoints(tmp_path / "c", BASE, CONFIG)


def test_a_whole_checkpoint_of_another_run_or_step_is_refused(runs, tmp_path):
    one, other = runs
    shutil.copytree(one, tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "2")
    shutil.copytree(other / "2", tmp_path / "c" / "2")
    with pytest.raises(UserError, match=r"c/2 is of another run; there config\.seeds is \[1\], here \[0\]"):
        Checkpoints(tmp_path / "c", BASE, CONFIG).restore(state_at(0))
    shutil.rmtree(tmp_path / "c" / "2")
    shutil.copytree(one / "1", tmp_path / "c" / "3")
    with pytest.raises(UserError, match=r"c/3 is damaged \(checkpoint.json is of step 1\); .*go on from step 1"):
        Checkpoints(tmp_path / "c", BASE, CONFIG)


def test_damage_to_an_earlier_checkpoint_is_told_and_the_only_one_leaves_the_beginning(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "c")
    (tmp_path / "c" / "1" / "checkpoint.json").write_text("{}")
    with pytest.raises(UserError, match=r"c/1 is damaged .* delete that folder to go on from step 2"):
        Checkpoints(tmp_path / "c", BASE, CONFIG)
    # The message does not recommend a checkpoint that is also damaged.
    (tmp_path / "c" / "2" / "checkpoint.json").write_text("[]")
    with pytest.raises(UserError, match=r"c/2 is damaged .* delete that folder to start from the beginning"):
        Checkpoints(tmp_path / "c", BASE, CONFIG)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.query = nnx.Linear(5, 5, rngs=rngs)
        self.head = nnx.Linear(5, 2, rngs=rngs)


def write_adapter(folder: Path, seed: int) -> None:
    rules = [Rule("query", CirculantUpdate())]
    model, adapter = adapt(Net(nnx.Rngs(0)), rules, train=["head/.*"], rngs=nnx.Rngs(seed))
    state = nnx.state(model, adapter.trainable)
    random = np.random.default_rng(seed)
    nnx.update(model, jax.tree.map(lambda leaf: leaf + random.normal(size=leaf.shape).astype(np.float32), state))
    save_adapter(folder, model, adapter)


@pytest.mark.exhaustive
def test_every_region_of_every_file_of_an_adapter(tmp_path):
    write_adapter(tmp_path / "a", 1)
    write_adapter(tmp_path / "other", 2)
    count = 0
    for name in files_of(tmp_path / "a"):
        path = tmp_path / "a" / name
        content = path.read_bytes()
        for what, changed in damaged(content, (tmp_path / "other" / name).read_bytes()):
            put(path, changed)
            with pytest.raises(UserError) as error:
                load_adapter(tmp_path / "a", Net(nnx.Rngs(0)))
            assert str(tmp_path / "a") in str(error.value), (name, what)
            count += 1
        path.write_bytes(content)
    print(f"{count} kinds of damage to an adapter: all refused")
    assert count > 2 * 3 * REGIONS
    # An undamaged adapter is read and is equal to the saved one.
    save_adapter(tmp_path / "again", *load_adapter(tmp_path / "a", Net(nnx.Rngs(0))))
    for name in files_of(tmp_path / "a"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
