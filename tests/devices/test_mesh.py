import jax
import numpy as np
import pytest

from surm_jax.devices.mesh import batch_sharding, make_mesh, put_batch, replicated
from surm_jax.errors import UserError


def test_zero_devices_mean_all():
    mesh = make_mesh(0, {"config.data.batch_size": 16})
    assert mesh.shape == {"data": 8, "fsdp": 1}
    assert list(mesh.devices.flat) == jax.devices()
    assert make_mesh(2, {}).shape == {"data": 2, "fsdp": 1}


def test_more_devices_than_there_are():
    with pytest.raises(UserError, match=r"data=9 times fsdp=1.*\(8\)"):
        make_mesh(9, {})


@pytest.mark.parametrize(
    ("size", "advice"), [(30, "take 24 or 32"), (63, "take 56 or 64"), (7, "take 8"), (1, "take 8")]
)
def test_a_batch_that_does_not_divide_is_refused_with_the_sizes_that_do(size, advice):
    with pytest.raises(UserError) as error:
        make_mesh(8, {"config.data.eval_batch_size": 8, "config.data.batch_size": size})
    assert f"config.data.batch_size={size} does not divide over 8 devices: {advice}, or fewer" in str(error.value)


def test_batches_are_split_and_the_rest_is_whole():
    mesh = make_mesh(4, {})
    batch = put_batch({"image": np.arange(24.0).reshape(8, 3), "label": np.arange(8)}, mesh)
    assert batch["image"].sharding == batch["label"].sharding == batch_sharding(mesh)
    for position, shard in enumerate(batch["label"].addressable_shards):
        assert np.asarray(shard.data).tolist() == [2 * position, 2 * position + 1]
    assert np.array_equal(batch["image"], np.arange(24.0).reshape(8, 3))
    whole = jax.device_put(np.arange(3), replicated(mesh))
    assert [shard.data.shape for shard in whole.addressable_shards] == [(3,)] * 4
