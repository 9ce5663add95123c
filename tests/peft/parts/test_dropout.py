import jax
import jax.numpy as jnp
import numpy as np
import pytest

from surm_jax.peft import adapter_dropout
from surm_jax.peft.parts.dropout import drop, dropout_key, keys_drawn, set_keys_drawn


def data(key):
    return jax.random.key_data(key).tolist()


def test_nothing_is_dropped_outside_or_without_a_key_or_at_rate_zero():
    x = jnp.ones((3, 4))
    assert dropout_key() is None and drop(x, 0.5) is x
    with adapter_dropout(None):
        assert dropout_key() is None and drop(x, 0.5) is x
    with adapter_dropout(jax.random.key(0)):
        assert drop(x, 0.0) is x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropout_zeroes_its_share_and_scales_the_rest(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(200, 100)) + 10, dtype)
    with adapter_dropout(jax.random.key(0)):
        y = drop(x, 0.2)
    assert y.dtype == dtype
    kept = np.asarray(y) != 0
    assert kept.mean() == pytest.approx(0.8, abs=0.01)
    np.testing.assert_array_equal(np.asarray(y)[kept], np.asarray(x / 0.8)[kept])
    # Entries are dropped independently, not as whole rows or columns.
    assert kept.mean(0).min() > 0.6 and kept.mean(1).min() > 0.6


def test_keys_are_drawn_in_order_from_the_blocks_key():
    with adapter_dropout(jax.random.key(0)):
        first = [data(dropout_key()) for _ in range(3)]
    with adapter_dropout(jax.random.key(0)):
        assert [data(dropout_key()) for _ in range(3)] == first
    with adapter_dropout(jax.random.key(1)):
        other = [data(dropout_key()) for _ in range(3)]
    assert len({str(key) for key in first + other}) == 6


def test_a_scan_draws_the_keys_of_a_loop():
    assert keys_drawn() is None
    set_keys_drawn(None)
    with adapter_dropout(jax.random.key(0)):
        looped = [data(dropout_key()) for _ in range(5)]
        assert keys_drawn() == 5

    def body(drawn, _):
        set_keys_drawn(drawn)
        keys = jax.random.key_data(jnp.stack([dropout_key(), dropout_key()]))
        return keys_drawn(), keys

    with adapter_dropout(jax.random.key(0)):
        drawn, scanned = jax.lax.scan(body, jnp.int32(keys_drawn()), length=2)
        set_keys_drawn(drawn)
        assert [*scanned.reshape(4, -1).tolist(), data(dropout_key())] == looped


def test_blocks_nest_and_end():
    with adapter_dropout(jax.random.key(0)):
        outer = data(dropout_key())
        with adapter_dropout(jax.random.key(0)):
            assert data(dropout_key()) == outer
        with adapter_dropout(None):
            assert dropout_key() is None
        assert data(dropout_key()) != outer
    with pytest.raises(ZeroDivisionError), adapter_dropout(jax.random.key(0)):
        raise ZeroDivisionError
    assert dropout_key() is None


def test_a_compiled_function_takes_the_key_as_an_argument():
    traces, x = [], jnp.ones((5, 5))

    @jax.jit
    def call(key):
        traces.append(key)
        with adapter_dropout(key):
            return drop(x, 0.5)

    with adapter_dropout(jax.random.key(7)):
        outside = drop(x, 0.5)
    np.testing.assert_array_equal(call(jax.random.key(7)), outside)
    assert not np.array_equal(call(jax.random.key(8)), outside)
    assert len(traces) == 1
