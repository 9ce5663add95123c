import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from surm_jax.errors import UserError
from surm_jax.training.checkpoints import Checkpoints
from surm_jax.training.mesh import make_mesh, replicated
from surm_jax.training.step import TrainState
from tests.training.tiny import assert_equal_bits, host

# Reading damaged files leaves some of Orbax's coroutines behind.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning"),
]

BASE = {"blocks/0/kernel": "0123456789abcdef"}
CONFIG = {"seeds": (0,), "optim": {"steps": 9}}
PLACE = {"next": 3, "nested": {"seed": [1, 2]}}


def state_at(step, width=5, extra=False):
    """A state with arrays that tell one step from another; numbers that only exact storage keeps are among them."""
    key = jax.random.key(step)
    trained = {"head/kernel": jax.random.normal(key, (width, 3)), "head/bias": jnp.array([1e-45, -0.0, jnp.inf])}
    if extra:
        trained["norm/scale"] = jnp.ones(2)
    optimizer = {"count": jnp.array(step, jnp.int32), "mu": jax.tree.map(lambda array: array / 3, trained)}
    state = TrainState(jnp.array(step, jnp.int32), trained, optimizer)
    return jax.device_put(state, replicated(make_mesh(0, {})))


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_a_state_comes_back_bit_for_bit(tmp_path):
    with Checkpoints(tmp_path / "c", BASE, CONFIG) as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(state_at(3), PLACE, 12.5, 0.5)
        assert checkpoints.latest == 3
    with Checkpoints(tmp_path / "c", BASE, CONFIG) as checkpoints:
        template = state_at(0)
        restored = checkpoints.restore(template)
    assert_equal_bits(host(restored.state), host(state_at(3)))
    assert (restored.data, restored.seconds) == (PLACE, 12.5)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored.state) == jax.tree.map(
        lambda leaf: leaf.sharding, template
    )


def test_the_last_two_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path, BASE, CONFIG) as checkpoints:
        for step, accuracy in [(1, 0.3), (2, None), (3, 0.9), (4, 0.5), (5, None), (6, 0.7)]:
            checkpoints.save(state_at(step), PLACE, 0.0, accuracy)
    assert steps_in(tmp_path) == [3, 5, 6]
    # The best of all, not the best since the run was started again.
    with Checkpoints(tmp_path, BASE, CONFIG) as checkpoints:
        checkpoints.save(state_at(7), PLACE, 0.0, 0.8)
        assert checkpoints.latest == 7
    assert steps_in(tmp_path) == [3, 6, 7]


def test_saving_a_step_again_replaces_it(tmp_path):
    with Checkpoints(tmp_path, BASE, CONFIG) as checkpoints:
        checkpoints.save(state_at(1), PLACE, 0.5, 0.8)
        checkpoints.save(state_at(2), PLACE, 1.0)
        assert checkpoints.restore(state_at(0)).score is None
        checkpoints.save(state_at(2), {"next": 9}, 2.0, 0.75)
        restored = checkpoints.restore(state_at(0))
        assert (restored.data, restored.seconds, restored.score) == ({"next": 9}, 2.0, 0.75)
    assert steps_in(tmp_path) == [1, 2]


def test_another_configuration_is_refused(tmp_path):
    with Checkpoints(tmp_path, BASE, CONFIG) as checkpoints:
        checkpoints.save(state_at(1), PLACE, 0.0)
    other = {**CONFIG, "optim": {"steps": 12}}
    message = r"1 is of another run; there config\.optim\.steps is 9, here 12$"
    with Checkpoints(tmp_path, BASE, other) as checkpoints, pytest.raises(UserError, match=message):
        checkpoints.restore(state_at(0))


def test_base_weights_are_not_in_it(tmp_path):
    with Checkpoints(tmp_path, BASE, CONFIG) as checkpoints:
        checkpoints.save(state_at(1), PLACE, 0.0)
    with Checkpoints(tmp_path, {"blocks/0/kernel": "f" * 16}, CONFIG) as checkpoints, pytest.raises(UserError) as error:
        checkpoints.restore(state_at(0))
    assert "blocks/0/kernel" in str(error.value) and str(tmp_path / "1") in str(error.value)


@pytest.mark.parametrize(
    ("template", "named"), [({"width": 4}, "head/kernel"), ({"extra": True}, "norm/scale"), ({}, None)]
)
def test_another_structure_is_refused_by_the_leaves_that_differ(tmp_path, template, named):
    with Checkpoints(tmp_path, BASE, CONFIG) as checkpoints:
        checkpoints.save(state_at(1), PLACE, 0.0)
        if named is None:
            checkpoints.restore(state_at(0, **template))
            return
        with pytest.raises(UserError, match=named) as error:
            checkpoints.restore(state_at(0, **template))
        assert "does not fit this run" in str(error.value)


def test_what_was_cut_off_while_it_was_written_is_not_there(tmp_path):
    with Checkpoints(tmp_path, BASE, CONFIG) as checkpoints:
        checkpoints.save(state_at(1), PLACE, 0.0)
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path, BASE, CONFIG) as checkpoints:
        assert checkpoints.latest == 1
        checkpoints.save(state_at(2), PLACE, 0.0)
        assert_equal_bits(host(checkpoints.restore(state_at(0)).state), host(state_at(2)))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cannot open the checkpoints in {tmp_path}/file/c"):
        Checkpoints(tmp_path / "file" / "c", BASE, CONFIG)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The best checkpoint at step 1, the last one at step 2."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder, BASE, CONFIG) as checkpoints:
        checkpoints.save(state_at(1), PLACE, 1.0, 0.9)
        checkpoints.save(state_at(2), PLACE, 2.0, 0.5)
    assert steps_in(folder) == [1, 2]
    return folder


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


DAMAGE = {
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "flipped": flip,
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_told_or_does_no_harm(saved, tmp_path, damage):
    names = sorted(path.relative_to(saved / "2") for path in (saved / "2").rglob("*") if path.is_file())
    told = set()
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        DAMAGE[damage](folder / "2" / name)
        try:
            with Checkpoints(folder, BASE, CONFIG) as checkpoints:
                # A file whose loss makes the checkpoint incomplete hides it: the earlier one takes its place.
                latest = checkpoints.latest
                restored = checkpoints.restore(state_at(0))
            assert_equal_bits(host(restored.state), host(state_at(latest)))
            assert (restored.data, restored.seconds) == (PLACE, float(latest)), name
        except UserError as error:
            told.add(str(name))
            assert str(folder / "2") in str(error), name
            assert "delete that folder to go on from step 1" in str(error), name
        shutil.rmtree(folder / "2", ignore_errors=True)
        with Checkpoints(folder, BASE, CONFIG) as checkpoints:
            assert_equal_bits(host(checkpoints.restore(state_at(0)).state), host(state_at(1)))
            checkpoints.save(state_at(3), PLACE, 3.0)
        assert 3 in steps_in(folder)
    if damage == "half":
        assert any(name.startswith("state/d/") for name in told)
        assert "_CHECKPOINT_METADATA" in told


def test_damage_to_the_best_is_told_and_leaves_the_last(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "c")
    DAMAGE["half"](tmp_path / "c" / "1" / "metrics" / "metrics")
    with pytest.raises(UserError, match=r"c/1 is damaged .* delete that folder to go on from step 2"):
        Checkpoints(tmp_path / "c", BASE, CONFIG)
    shutil.rmtree(tmp_path / "c" / "1")
    with Checkpoints(tmp_path / "c", BASE, CONFIG) as checkpoints:
        assert_equal_bits(host(checkpoints.restore(state_at(0)).state), host(state_at(2)))


def test_the_only_checkpoint_damaged_leaves_the_beginning(saved, tmp_path):
    shutil.copytree(saved / "2", tmp_path / "2")
    for path in (tmp_path / "2" / "state" / "d").iterdir():
        DAMAGE["half"](path)
    with Checkpoints(tmp_path, BASE, CONFIG) as checkpoints, pytest.raises(UserError) as error:
        checkpoints.restore(state_at(0))
    assert "delete that folder to start from the beginning" in str(error.value)


def test_arrays_that_changed_where_the_store_does_not_look_are_found(saved, tmp_path, monkeypatch):
    # The last line of defence: every number read is compared with what was written.
    shutil.copytree(saved, tmp_path / "c")
    with Checkpoints(tmp_path / "c", BASE, CONFIG) as checkpoints:
        load = checkpoints._orbax.load

        def bad_load(step, abstract):
            state = load(step, abstract)
            state["trained"]["head/kernel"] = state["trained"]["head/kernel"].at[0, 0].add(np.float32(1e-3))
            return state

        monkeypatch.setattr(checkpoints._orbax, "load", bad_load)
        with pytest.raises(UserError, match="not those that were saved"):
            checkpoints.restore(state_at(0))
