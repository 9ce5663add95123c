"""Tests that a family defined outside the package works everywhere a family of the package works."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax import Rule, adapt
from surm_jax.peft import StructuredUpdate
from surm_jax.structured import EXECUTIONS, FAMILIES, approximations, updated_matmul
from surm_jax.structured.analysis.draw import draw
from surm_jax.training.parsing import base_config, parse
from tests.structured.cases import ProjectionContract, assert_close
from tests.structured.families.own_family import Banded


class TestBanded(ProjectionContract):
    family = Banded

    def dense(self, arrays, shape):
        return sum(number * np.eye(*shape, k) for k, number in enumerate(arrays["d"]))


def test_it_is_compared_and_drawn():
    assert FAMILIES["Banded"] is Banded
    kept = approximations(np.eye(6, dtype=np.float32), budget=3, steps=0)["Banded"]
    assert kept.options == {"bands": 3} and kept.energy == pytest.approx(1)
    assert draw(Banded.example()).get_suptitle() == "Banded, 8 x 8, 2 parameters"


@pytest.mark.parametrize("how", EXECUTIONS)
def test_it_has_every_execution(how):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(3, 8)).astype(np.float32), rng.normal(size=(8, 8)).astype(np.float32)
    update = Banded.example()
    M = np.asarray(update.d)[0] * np.eye(8) + np.asarray(update.d)[1] * np.eye(8, k=1)
    y, pull = jax.vjp(lambda update: updated_matmul(jnp.asarray(x), jnp.asarray(kernel), update, execution=how), update)
    assert_close(y, np.float64(x) @ (kernel + M), "float32")
    dM = np.float64(x).T @ np.ones((3, 8))
    assert_close(pull(jnp.ones_like(y))[0].d, [np.trace(dM), np.trace(dM, 1)], "float32")


def test_a_configuration_names_it_and_it_learns():
    config = base_config()
    config.update_from_flattened_dict({"peft.method": "structured", "peft.structured.family": "Banded + Circulant"})
    method = parse(config).peft.methods["structured"]
    assert isinstance(method, StructuredUpdate)
    model, adapter = adapt(nnx.Linear(6, 6, rngs=nnx.Rngs(0)), [Rule("", method)], rngs=nnx.Rngs(1))
    graphdef, trainable, frozen = nnx.split(model, adapter.trainable, ...)
    x = jnp.arange(12.0).reshape(2, 6)
    loss = lambda trainable: jnp.mean(nnx.merge(graphdef, trainable, frozen)(x) ** 2)  # noqa: E731
    before, grads = jax.value_and_grad(loss)(trainable)
    assert {path[-1] for path, _ in nnx.to_flat_state(grads)} == {"terms_0_d", "terms_1_c"}
    assert loss(jax.tree.map(lambda p, g: p - 1e-4 * g, trainable, grads)) < before
