import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint.experimental import v1 as ocp

from surm_jax import atomic
from surm_jax.atomic import remove_folder
from surm_jax.devices.mesh import make_mesh, replicated
from surm_jax.errors import UserError
from surm_jax.record.checkpoints import Checkpoints, last_checkpoint
from surm_jax.training.step import TrainState
from tests.training.tiny import assert_equal_bits, host

BASE = {"blocks/0/kernel": "0123456789abcdef"}
CONFIG = {"seeds": (0,), "optim": {"steps": 9}}
PLACE = {"next": 3, "nested": {"seed": [1, 2]}}


def state_at(step, width=5, extra=False):
    """Return a training state with different arrays for each step.

    They include a denormal number, negative zero and infinity, so that a test finds inexact storage.

    Args:
        step: The number of updates.
        width: The first dimension of an array, so that a test can change its shape.
        extra: Whether to add one more trained array, so that a test can change the structure.
    """
    key = jax.random.key(step)
    trained = {"head/kernel": jax.random.normal(key, (width, 3)), "head/bias": jnp.array([1e-45, -0.0, jnp.inf])}
    if extra:
        trained["norm/scale"] = jnp.ones(2)
    optimizer = {"count": jnp.array(step, jnp.int32), "mu": jax.tree.map(lambda array: array / 3, trained)}
    state = TrainState(jnp.array(step, jnp.int32), trained, optimizer)
    return jax.device_put(state, replicated(make_mesh(0, {})))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_state_comes_back_bit_for_bit(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", BASE, CONFIG)
    assert checkpoints.latest is None
    assert last_checkpoint(tmp_path / "c") == "There is no checkpoint yet"
    checkpoints.save(state_at(3), PLACE, 12.5, 0.5)
    assert checkpoints.latest == 3
    template = state_at(0)
    restored = Checkpoints(tmp_path / "c", BASE, CONFIG).restore(template)
    assert_equal_bits(host(restored.state), host(state_at(3)))
    assert (restored.data, restored.seconds, restored.score) == (PLACE, 12.5, 0.5)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored.state) == jax.tree.map(
        lambda leaf: leaf.sharding, template
    )
    assert last_checkpoint(tmp_path / "c") == f"The last good checkpoint is that of step 3, {tmp_path / 'c' / '3'}"


def test_the_last_two_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, BASE, CONFIG)
    for step, accuracy in [(1, 0.3), (2, None), (3, 0.9), (4, 0.5), (5, None), (6, 0.7)]:
        checkpoints.save(state_at(step), PLACE, 0.0, accuracy)
    assert names_in(tmp_path) == ["3", "5", "6"]
    # After a restart, the best checkpoint is still the best of the whole run.
    checkpoints = Checkpoints(tmp_path, BASE, CONFIG)
    checkpoints.save(state_at(7), PLACE, 0.0, 0.8)
    assert checkpoints.latest == 7
    assert names_in(tmp_path) == ["3", "6", "7"]


def test_steps_are_numbers_and_not_text(tmp_path):
    checkpoints = Checkpoints(tmp_path, BASE, CONFIG)
    for step in (9, 10, 11):
        checkpoints.save(state_at(step), PLACE, 0.0)
    assert checkpoints.latest == Checkpoints(tmp_path, BASE, CONFIG).latest == 11
    assert names_in(tmp_path) == ["10", "11"]
    assert "step 11" in last_checkpoint(tmp_path)


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints = Checkpoints(tmp_path, BASE, CONFIG)
    checkpoints.save(state_at(1), PLACE, 0.5, 0.8)
    checkpoints.save(state_at(2), PLACE, 1.0)
    assert checkpoints.restore(state_at(0)).score is None
    checkpoints.save(state_at(2), {"next": 9}, 2.0, 0.75)
    restored = checkpoints.restore(state_at(0))
    assert (restored.data, restored.seconds, restored.score) == ({"next": 9}, 2.0, 0.75)
    assert names_in(tmp_path) == ["1", "2"]


def test_another_configuration_is_refused(tmp_path):
    Checkpoints(tmp_path, BASE, CONFIG).save(state_at(1), PLACE, 0.0)
    other = {**CONFIG, "optim": {"steps": 12}}
    with pytest.raises(UserError, match=r"1 is of another run; there config\.optim\.steps is 9, here 12$"):
        Checkpoints(tmp_path, BASE, other).restore(state_at(0))


def test_another_base_is_refused(tmp_path):
    Checkpoints(tmp_path, BASE, CONFIG).save(state_at(1), PLACE, 0.0)
    with pytest.raises(UserError) as error:
        Checkpoints(tmp_path, {"blocks/0/kernel": "f" * 16}, CONFIG).restore(state_at(0))
    assert "blocks/0/kernel" in str(error.value) and str(tmp_path / "1") in str(error.value)


@pytest.mark.parametrize(
    ("template", "named"), [({"width": 4}, "head/kernel"), ({"extra": True}, "norm/scale"), ({}, None)]
)
def test_another_structure_is_refused_by_the_leaves_that_differ(tmp_path, template, named):
    checkpoints = Checkpoints(tmp_path, BASE, CONFIG)
    checkpoints.save(state_at(1), PLACE, 0.0)
    if named is None:
        checkpoints.restore(state_at(0, **template))
        return
    with pytest.raises(UserError, match=named) as error:
        checkpoints.restore(state_at(0, **template))
    assert "does not fit this run" in str(error.value)


def killed(*_, **__):
    raise KeyboardInterrupt


def test_what_was_cut_off_while_it_was_written_or_removed_is_not_there(tmp_path, monkeypatch):
    Checkpoints(tmp_path, BASE, CONFIG).save(state_at(1), PLACE, 0.0)
    shutil.copytree(tmp_path / "1", tmp_path / ".2.tmp")
    shutil.copytree(tmp_path / "1", tmp_path / ".1.0123abcd.old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic.shutil, "rmtree", killed)
        remove_folder(shutil.copytree(tmp_path / "1", tmp_path / "3"))
    checkpoints = Checkpoints(tmp_path, BASE, CONFIG)
    assert names_in(tmp_path) == ["1"] and checkpoints.latest == 1
    checkpoints.save(state_at(2), PLACE, 0.0)
    assert_equal_bits(host(checkpoints.restore(state_at(0)).state), host(state_at(2)))


def test_what_was_cut_off_while_it_was_replaced_is_there_as_it_was(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, BASE, CONFIG)
    checkpoints.save(state_at(1), PLACE, 0.0)
    checkpoints.save(state_at(2), PLACE, 1.0)
    replace = os.replace
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        # Simulate a kill between two renames: the old folder no longer has the final name, and the new one not yet.
        patch.setattr(atomic.os, "replace", lambda old, new: killed() if Path(new).name == "2" else replace(old, new))
        checkpoints.save(state_at(2), PLACE, 2.0, 0.5)
    assert not (tmp_path / "2").exists()
    checkpoints = Checkpoints(tmp_path, BASE, CONFIG)
    assert names_in(tmp_path) == ["1", "2"]
    restored = checkpoints.restore(state_at(0))
    assert_equal_bits(host(restored.state), host(state_at(2)))
    assert (restored.seconds, restored.score) == (1.0, None)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cannot open the checkpoints in {tmp_path}/file/c"):
        Checkpoints(tmp_path / "file" / "c", BASE, CONFIG)


def test_arrays_that_changed_where_the_store_does_not_look_are_found(tmp_path, monkeypatch):
    # Change an array after Orbax has read it. The last check, of all bits of all arrays, must find this.
    checkpoints = Checkpoints(tmp_path, BASE, CONFIG)
    checkpoints.save(state_at(1), PLACE, 0.0)
    load = ocp.load

    def bad_load(path, abstract):
        state = load(path, abstract)
        state["trained"]["head/kernel"] = state["trained"]["head/kernel"].at[0, 0].add(np.float32(1e-3))
        return state

    monkeypatch.setattr(ocp, "load", bad_load)
    with pytest.raises(UserError, match="not those that were saved"):
        checkpoints.restore(state_at(0))
