import functools

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft import LoRA, path_mask, train_only
from tests.peft.models import FAST_TO_COMPILE, same_bits
from tests.peft.net import net, tuned


def arrays(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def layer(seed):
    return {"w": arrays(3, 2, seed=seed), "b": arrays(2, seed=seed + 1)}


# Each value holds a tree, a list of patterns, and the paths of the leaves that these patterns match.
TREES = {
    "nested": (
        {"body": {"0": {"kernel": arrays(3, 2), "bias": arrays(2)}}, "head": {"kernel": arrays(2, 2)}},
        ["head/.*", ".*/bias"],
        {"head/kernel", "body/0/bias"},
    ),
    "haiku": (
        {"mlp/~/linear_0": layer(1), "mlp/~/linear_1": layer(3), "head": layer(5)},
        [r"mlp/~/linear_1/w", r"head/.*"],
        {"mlp/~/linear_1/w", "head/w", "head/b"},
    ),
    "linen": (
        flax.core.freeze({"params": {"Dense_0": layer(1), "Dense_1": layer(3)}}),
        ["params/Dense_1/.*"],
        {"params/Dense_1/w", "params/Dense_1/b"},
    ),
    "lists": (
        {"layers": [layer(1), layer(3)], "pair": (arrays(2), None, arrays(3))},
        [r"layers/\d/b", "pair/2"],
        {"layers/0/b", "layers/1/b", "pair/2"},
    ),
}
# The state of an adapted model. The indices of an `nnx.List` are dictionary keys in it.
model, _ = tuned(net(), LoRA(rank=2), name="mine")
TREES["nnx"] = (
    nnx.to_pure_dict(nnx.state(model, nnx.Param)),
    [".*/delta/mine/.*", "head/.*"],
    {*(f"body/{i}/delta/mine/{factor}" for i in (0, 1) for factor in ("down", "up")), "head/kernel", "head/bias"},
)


def flat(tree):
    """Return the leaves of a tree by path, without `jax.tree_util`, which the tested code uses."""
    if isinstance(tree, dict | flax.core.FrozenDict):
        items = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        return {} if tree is None else {"": tree}
    found = {}
    for key, child in items:
        for path, leaf in flat(child).items():
            found[f"{key}/{path}".removesuffix("/")] = leaf
    return found


def gradients(tree, seed=9):
    return jax.tree.map(lambda a: arrays(*a.shape, seed=seed) + 3.0, tree)


@pytest.mark.parametrize("kind", TREES)
def test_the_mask_has_the_form_of_the_tree(kind):
    tree, patterns, trained = TREES[kind]
    mask = path_mask(tree, patterns)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    assert flat(mask) == {path: path in trained for path in flat(tree)}
    assert 0 < len(trained) < len(flat(tree))


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "jit"), [("nested", False), *((kind, True) for kind in TREES)])
def test_frozen_leaves_get_exactly_nothing_and_the_others_what_optax_gives(kind, jit):
    tree, patterns, trained = TREES[kind]
    # Without a mask, weight decay would change frozen leaves, and the norm for clipping would include their gradients.
    make = lambda: optax.chain(  # noqa: E731
        optax.clip_by_global_norm(0.5), optax.trace(0.9), optax.add_decayed_weights(0.1), optax.scale(-0.1)
    )
    optimizer, params = train_only(make(), patterns), tree
    state = optimizer.init(params)
    alone = {path: leaf for path, leaf in flat(tree).items() if path in trained}
    plain_state = make().init(alone)
    bytes_of = lambda tree: sorted(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert bytes_of(state) == bytes_of(plain_state) == sorted(leaf.nbytes for leaf in alone.values())
    update = jax.jit(optimizer.update, compiler_options=FAST_TO_COMPILE) if jit else optimizer.update
    for step in range(3):
        grads = gradients(params, seed=step)
        updates, state = update(grads, state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        own = {path: leaf for path, leaf in flat(grads).items() if path in trained}
        wanted, plain_state = make().update(own, plain_state, alone)
        for path, moved in flat(updates).items():
            if path in trained:
                np.testing.assert_allclose(moved, wanted[path], rtol=1e-5, atol=1e-7)
                assert np.abs(moved).max() > 1e-3
            else:
                assert same_bits(moved, jnp.zeros_like(moved)) and np.abs(flat(grads)[path]).min() > 0
        params, alone = optax.apply_updates(params, updates), optax.apply_updates(alone, wanted)
    for path, leaf in flat(params).items():
        assert same_bits(leaf, flat(tree)[path]) == (path not in trained)


def test_a_frozen_gradient_may_be_anything():
    tree = {"a": arrays(2), "b": arrays(2, seed=1)}
    optimizer = train_only(optax.sgd(1.0), ["a"])
    updates, _ = optimizer.update({"a": jnp.ones(2), "b": jnp.array([jnp.nan, jnp.inf])}, optimizer.init(tree), tree)
    assert same_bits(updates["b"], jnp.zeros(2)) and same_bits(updates["a"], -jnp.ones(2))


def test_adam_has_moments_of_trained_leaves_alone():
    tree, patterns, trained = TREES["nnx"]
    state = train_only(optax.adam(1e-3), patterns).init(tree)
    numbers = sum(flat(tree)[path].size for path in trained)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * numbers + 1  # The counter adds 1.
    assert numbers < sum(leaf.size for leaf in jax.tree.leaves(tree)) / 2


@pytest.mark.parametrize(
    ("kind", "patterns", "message"),
    [
        ("nested", ["head/.*", "head/bais"], "'head/bais' matches no leaf of the tree .*nearest of 3: .*head/kernel"),
        ("haiku", ["mlp/~/linear_2/w"], "'mlp/~/linear_2/w' matches no leaf of the tree .*mlp/~/linear_0/w"),
        ("linen", ["Dense_1/.*"], "'Dense_1/.*' matches no leaf of the tree .*params/Dense_0/"),
        ("nnx", ["heads/.*"], "'heads/.*' matches no leaf of the tree .*head/kernel"),
        ("nnx", ["(head"], "is not a regular expression"),
    ],
)
def test_a_pattern_that_selects_nothing_is_refused_with_the_nearest(kind, patterns, message):
    optimizer = train_only(optax.sgd(1.0), patterns)
    with pytest.raises(UserError, match=message):
        optimizer.init(TREES[kind][0])
    with pytest.raises(UserError, match=message):
        path_mask(TREES[kind][0], patterns)


def test_patterns_are_a_list_of_at_least_one():
    tree = {"a": arrays(2), "b": arrays(2, seed=1)}
    for call in (lambda: train_only(optax.sgd(1.0), "a").init(tree), lambda: path_mask(tree, "a")):
        with pytest.raises(UserError, match=r"got one string: write \['a'\]"):
            call()
    with pytest.raises(UserError, match="train_only needs at least one pattern"):
        train_only(optax.sgd(1.0), [])
    # A generator can be read only once. If `train_only` did not copy it, later calls would freeze all leaves.
    once = train_only(optax.sgd(1.0), (pattern for pattern in ["a"]))
    for _ in range(2):
        updates, _ = once.update(tree, once.init(tree), tree)
        assert same_bits(updates["a"], -tree["a"]) and same_bits(updates["b"], jnp.zeros(2))


def test_a_model_learns_with_the_whole_tree_under_one_chain():
    graphdef, state = nnx.split(model)
    tree = nnx.to_pure_dict(state)
    scales = {path for path in flat(tree) if path.endswith("/scale") and "/delta/" in path}
    optimizer = train_only(optax.sgd(0.1), [".*/delta/mine/(down|up)", "head/.*"])
    x = arrays(4, 2, 6, seed=3)

    def loss(tree):
        own = nnx.clone(state)
        nnx.replace_by_pure_dict(own, tree)
        return jnp.mean((nnx.merge(graphdef, own)(x) - 1.0) ** 2)

    @functools.partial(jax.jit, compiler_options=FAST_TO_COMPILE)
    def step(tree, opt_state):
        value, grads = jax.value_and_grad(loss)(tree)
        updates, opt_state = optimizer.update(grads, opt_state, tree)
        return optax.apply_updates(tree, updates), opt_state, value, grads

    before, opt_state, losses = tree, optimizer.init(tree), []
    for _ in range(3):
        tree, opt_state, value, grads = step(tree, opt_state)
        losses.append(float(value))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    moved = {path for path, leaf in flat(tree).items() if not same_bits(leaf, flat(before)[path])}
    assert moved == TREES["nnx"][2]
    frozen = flat(grads).keys() - moved - scales
    assert all(np.abs(flat(grads)[path]).max() > 0 for path in frozen)
