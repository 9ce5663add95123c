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
    fails("'optimizer.step'", file=file, ignore=["optimizer"], fresh={"blocks/9/bias"})  # the whole key must match


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


def test_long_lists_are_cut():
    with pytest.raises(UserError) as error:
        run(weights(**{f"extra_{i}": 0 for i in range(30)}))
    assert len(re.findall("nothing reads", str(error.value))) == 8
    assert "... and 22 more" in str(error.value)
