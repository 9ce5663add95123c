import hashlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft import Adapter, check_fingerprint, fingerprint
from surm_jax.peft.fingerprint import checksums
from tests.peft.models import base, parameters


def state(**arrays):
    return nnx.state(nnx.Dict({name: nnx.Param(array) for name, array in arrays.items()}))


def digest(array):
    return fingerprint(state(kernel=array))["kernel"]


def test_every_parameter_has_the_digest_of_path_type_shape_and_bytes():
    # This repeats the formula of the digest. It must not change, since files of earlier versions must stay readable.
    expected = {
        path: hashlib.sha256(f"{path} {array.dtype} {array.shape}".encode() + array.tobytes()).hexdigest()[:16]
        for path, array in parameters(base("bfloat16_kernels")).items()
    }
    assert fingerprint(nnx.state(base("bfloat16_kernels"))) == expected


def test_equal_weights_have_equal_fingerprints():
    assert digest(jnp.arange(6.0)) == digest(jnp.arange(6.0))


@pytest.mark.parametrize(
    "other",
    [
        np.nextafter(np.arange(6, dtype=np.float32), np.float32(9)),  # Each value is the next larger float32 number.
        np.array([-0.0, 1, 2, 3, 4, 5], np.float32),  # -0.0 equals 0.0, but has another sign bit.
        np.arange(6, dtype=np.int32),
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(6, dtype=np.float32).astype(jnp.bfloat16),
    ],
)
def test_any_other_bit_type_or_shape_shows(other):
    assert digest(jnp.asarray(other)) != digest(jnp.arange(6.0))


def test_the_path_is_part_of_it():
    one, two = fingerprint(state(a=jnp.ones(2))), fingerprint(state(b=jnp.ones(2)))
    assert one["a"] != two["b"]


def test_a_number_without_shape_has_a_fingerprint():
    assert digest(jnp.float32(1.0)) != digest(jnp.float32(2.0))


def test_parameters_and_statistics_count():
    model = nnx.Dict(norm=nnx.BatchNorm(3, rngs=nnx.Rngs(0)), dropout=nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    assert fingerprint(nnx.state(model)).keys() == {"norm/scale", "norm/bias", "norm/mean", "norm/var"}


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8", "int4", "uint32", "bool", "complex64"]
)
def test_a_checksum_shows_every_changed_entry_and_every_exchange(dtype):
    def checksum(array):
        return checksums(nnx.Dict(kernel=nnx.Param(array)), Adapter(()))["kernel"]

    plain = np.tile([[0, 1], [1, 1]], (2, 1)).astype(jnp.dtype(dtype))
    found = {checksum(jnp.asarray(plain)), checksum(jnp.asarray(plain.reshape(2, 4))), checksum(jnp.asarray(plain.T))}
    for place in np.ndindex(plain.shape):
        other = plain.copy()
        other[place] = 1 - int(other[place].real)
        found.add(checksum(jnp.asarray(other)))
    assert len(found) == 3 + plain.size and checksum(plain) == checksum(jnp.asarray(plain))


def test_an_abstract_model_has_no_checksums():
    assert checksums(nnx.eval_shape(lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0))), Adapter(())) is None


def test_the_same_base_passes():
    check_fingerprint({"a": "1"}, {"a": "1"}, "the adapter x")


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        ({"a": "1"}, "it lacks b$"),
        ({"a": "1", "b": "2", "c": "3"}, "it also has c$"),
        ({"a": "1", "b": "3"}, "other shapes or values in b$"),
        ({"b": "3", "c": "3"}, "it lacks a; it also has c; other shapes or values in b$"),
    ],
)
def test_what_differs_is_named(actual, message):
    with pytest.raises(
        UserError, match=r"^the base model is not the one that the adapter x was trained on: " + message
    ):
        check_fingerprint(actual, {"a": "1", "b": "2"}, "the adapter x")


def test_many_differences_are_counted():
    with pytest.raises(UserError, match=r"it lacks p0, p1, p2, p3 and 5 more$"):
        check_fingerprint({}, {f"p{i}": "" for i in range(9)}, "the adapter x")
