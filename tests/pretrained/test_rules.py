import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from surm_jax.errors import UserError
from surm_jax.pretrained.rules import KeyRule, fill


def transpose(array, shape):
    return array.T


RULES = (
    KeyRule(r"layer_(\d+)\.weight", r"blocks/\1/kernel", transpose),
    KeyRule(r"layer_(\d+)\.(bias)", r"blocks/\1/\2"),
    KeyRule(r"(.*)\.old_bias", r"blocks/0/bias"),
)
TARGETS = {
    "blocks/0/kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32),
    "blocks/0/bias": jax.ShapeDtypeStruct((3,), jnp.float32),
}


def weights(**changes):
    file = {"layer_0.weight": np.arange(6.0, dtype=np.float32).reshape(3, 2), "layer_0.bias": np.ones(3, np.float32)}
    return file | changes


def run(file, targets=TARGETS, **options):
    return fill(file, file.__getitem__, targets, RULES, origin="weights.bin", **options)


def fails(*messages, **arguments):
    with pytest.raises(UserError, match=r"weights\.bin does not fit the model") as error:
        run(**arguments)
    for message in messages:
        assert message in str(error.value)


def test_names_and_transforms():
    filled = run(weights())
    assert filled.keys() == TARGETS.keys()
    np.testing.assert_array_equal(filled["blocks/0/kernel"], [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]])
    np.testing.assert_array_equal(filled["blocks/0/bias"], np.ones(3))


def test_unknown_key_is_named_with_the_nearest():
    fails("nothing reads the key 'layer_0.wight'; did you mean 'layer_0.weight'", file=weights(**{"layer_0.wight": 0}))


def test_key_for_a_parameter_that_is_not_there():
    fails("'layer_7.bias' is for 'blocks/7/bias', which the model does not have", file=weights(**{"layer_7.bias": 0}))


def test_missing_key_names_the_parameter():
    file = weights()
    del file["layer_0.bias"]
    fails("no key fills 'blocks/0/bias' (as 'layer_0.weight' fills 'blocks/0/kernel')", file=file)


def test_two_keys_for_one_parameter():
    fails("'blocks/0/bias' is filled by 'layer_0.bias' and by 'x.old_bias'", file=weights(**{"x.old_bias": 0}))


def test_ignored_keys_and_keys_of_fresh_parameters():
    file = weights(**{"optimizer.step": 0, "layer_9.bias": 0})
    assert run(file, ignore=[r"optimizer\..*"], fresh={"blocks/9/bias"}).keys() == TARGETS.keys()
    fails("'optimizer.step'", file=file, ignore=["optimizer"], fresh={"blocks/9/bias"})  # The whole key must match.


def test_names_are_settled_before_anything_is_read():
    def read(key):
        raise AssertionError(key)

    with pytest.raises(UserError, match="no key fills"):
        fill(["layer_0.bias"], read, TARGETS, RULES, origin="weights.bin")


def test_all_shapes_are_in_one_error_and_checked_after_the_transform():
    file = weights(**{"layer_0.weight": np.ones((2, 3), np.float32), "layer_0.bias": np.ones(4, np.float32)})
    fails(
        "'layer_0.weight' has shape (2, 3), but 'blocks/0/kernel' is (2, 3)",
        "'layer_0.bias' has shape (4,), but 'blocks/0/bias' is (3,)",
        file=file,
    )


def test_dtypes_are_widened_but_never_narrowed():
    half = np.array([1.0, 2.5, -3.0], ml_dtypes.bfloat16)
    filled = run(weights(**{"layer_0.bias": half}))
    assert filled["blocks/0/bias"].dtype == jnp.float32
    np.testing.assert_array_equal(filled["blocks/0/bias"], [1.0, 2.5, -3.0])
    for dtype in (np.float64, np.int8):
        fails(f"'layer_0.bias' is {np.dtype(dtype)}", "float32", file=weights(**{"layer_0.bias": np.ones(3, dtype)}))


def test_half_precision_is_widened_exactly():
    for half in (np.array([1.0, 2.0**-24, -65504.0], np.float16), np.array([1.0, 1e-38, 3e38], ml_dtypes.bfloat16)):
        filled = run(weights(**{"layer_0.bias": half}))
        np.testing.assert_array_equal(np.asarray(filled["blocks/0/bias"]).astype(half.dtype), half)


def test_bfloat16_parameters_are_rounded_to_the_nearest():
    target = {**TARGETS, "blocks/0/bias": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}
    step = 2.0**-7
    stored = np.array([1 + 0.4 * step, 1 + 0.6 * step, 1 + 0.5 * step], np.float32)  # A tie is rounded to even.
    for dtype in (np.float32, np.float64):
        filled = run(weights(**{"layer_0.bias": stored.astype(dtype)}), targets=target)
        assert filled["blocks/0/bias"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(filled["blocks/0/bias"].astype(jnp.float32), [1.0, 1 + step, 1.0])
    fails("is int32", "bfloat16", file=weights(**{"layer_0.bias": np.ones(3, np.int32)}), targets=target)


def test_arrays_are_read_in_the_order_of_the_file_and_put_where_they_are_wanted():
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", None))
    one = jax.sharding.SingleDeviceSharding(devices[3])
    targets = {
        "blocks/0/bias": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=one),
        "blocks/0/kernel": jax.ShapeDtypeStruct((16, 5), jnp.float32, sharding=split),
    }
    file = {"layer_0.weight": np.arange(80.0, dtype=np.float32).reshape(5, 16), "layer_0.bias": np.ones(3, np.float32)}
    read = []
    filled = fill(file, lambda key: read.append(key) or file[key], targets, RULES, origin="weights.bin")
    assert read == ["layer_0.weight", "layer_0.bias"]
    assert filled["blocks/0/bias"].devices() == {devices[3]}
    kernel = filled["blocks/0/kernel"]
    assert kernel.sharding == split
    for shard in kernel.addressable_shards:
        np.testing.assert_array_equal(shard.data, file["layer_0.weight"].T[shard.index])
        assert shard.data.shape == (2, 5)


def test_long_lists_are_cut():
    with pytest.raises(UserError) as error:
        run(weights(**{f"extra_{i}": 0 for i in range(30)}))
    assert len(re.findall("nothing reads", str(error.value))) == 8
    assert "... and 22 more" in str(error.value)
