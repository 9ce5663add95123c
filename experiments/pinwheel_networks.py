"""Points on a pinwheel, and small networks whose hidden layer is one of several matrices, trained side by side."""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from surm_jax import structured

WIDTH, SPOKES = 64, 5
# How each layer is made, and the deviation of its parameters that gives the matrix entries a deviation of about 1/8.
LAYERS = {
    "dense": (structured.Dense.init, WIDTH**-0.5),
    "lora": (functools.partial(structured.LowRank.init, rank=1), WIDTH**-0.25),
    "circulant": (structured.CirculantPair.init, WIDTH**-0.25),
    "symmetric_toeplitz": (structured.SymmetricToeplitzPair.init, WIDTH**-0.5),
    "toeplitz": (structured.Toeplitz.init, WIDTH**-0.5),
}


class Points(NamedTuple):
    """Points of the plane, in float32, and their spokes."""

    x: Float[np.ndarray, "points 2"]
    labels: Int[np.ndarray, " points"]


class Network(NamedTuple):
    """The parameters of a network, or of a stack of them; `hidden` is the layer that is replaced."""

    bottom: Float[Array, "2 width"]
    bottom_bias: Float[Array, " width"]
    hidden: structured.StructuredMatrix
    hidden_bias: Float[Array, " width"]
    top: Float[Array, "width spokes"]
    top_bias: Float[Array, " spokes"]


def pinwheel(draws: np.random.Generator, per_spoke: int) -> Points:
    """Return points on a pinwheel, `per_spoke` on each spoke.

    As in Johnson et al. (2016), arXiv 1603.06277: normal along a spoke (mean 1, standard deviation 0.3) and across it
    (0.1), and turned by exp(distance) / 4.
    """
    labels = np.repeat(np.arange(SPOKES), per_spoke)
    along, across = draws.normal(size=(2, labels.size)) * [[0.3], [0.1]] + [[1.0], [0.0]]
    angle = 2 * np.pi * labels / SPOKES + np.exp(along) / 4
    x, y = along * np.cos(angle) - across * np.sin(angle), along * np.sin(angle) + across * np.cos(angle)
    return Points(np.stack([x, y], axis=1).astype(np.float32), labels)


def start(layer: str, seed: int) -> Network:
    """Return a network with random weights, where bottom and top depend only on the seed and not on the layer."""
    draws = np.random.default_rng(seed)

    def normal(deviation: float, *shape: int) -> Float[np.ndarray, "..."]:
        return draws.normal(0, deviation, shape).astype(np.float32)

    bottom, top = normal(1.0, 2, WIDTH), normal(WIDTH**-0.5, WIDTH, SPOKES)
    init, deviation = LAYERS[layer]
    empty = jax.eval_shape(lambda: init(jax.random.key(0), (WIDTH, WIDTH), scale=1.0))
    hidden = jax.tree.map(lambda array: normal(deviation, *array.shape), empty)
    zeros = np.zeros(WIDTH, np.float32)
    return Network(bottom, zeros, hidden, zeros, top, zeros[:SPOKES])


def forward(network: Network, x: Float[Array, "points 2"]) -> tuple[Array, Array]:
    """Return the outputs of the hidden layer, (points, width), and the scores of the spokes, (points, spokes)."""
    hidden = jnp.tanh(x @ network.bottom + network.bottom_bias[None])
    # For so small a matrix, forming it costs less than transforming the points.
    hidden = jnp.tanh(structured.matmul(hidden, network.hidden, execution="dense") + network.hidden_bias[None])
    return hidden, hidden @ network.top + network.top_bias[None]


def cross_entropy(scores: Float[Array, "points spokes"], points: Points) -> Float[Array, ""]:
    """Return the loss, a mean over points."""
    return optax.softmax_cross_entropy_with_integer_labels(scores, points.labels).mean()


@functools.partial(jax.jit, static_argnames="epochs")
def train(
    networks: Network,
    rates: Float[Array, " networks"],
    bottoms: Float[Array, " networks"],
    points: Points,
    *,
    epochs: int,
) -> tuple[Network, Float[Array, "networks epochs"]]:
    """Train a stack of networks side by side, in one program for all seeds, rates and both kinds of bottom layer.

    Args:
        networks: The networks at their start, stacked.
        rates: The first learning rate of each.
        bottoms: The factor that multiplies the steps of each bottom layer.
        points: The training points.
        epochs: The number of steps, each on all points.

    Returns:
        The trained networks, and the loss of each before every step.
    """
    adam, share = optax.scale_by_adam(), optax.cosine_decay_schedule(1.0, epochs)

    def loss(network):
        return cross_entropy(forward(network, points.x)[1], points)

    def step(carry, epoch, rate, bottom):
        network, state = carry
        value, gradient = jax.value_and_grad(loss)(network)
        moves, state = adam.update(gradient, state)
        moves = moves._replace(bottom=bottom * moves.bottom, bottom_bias=bottom * moves.bottom_bias)
        rate *= share(epoch)
        return (jax.tree.map(lambda value, move: value - rate * move, network, moves), state), value

    def train_one(network, rate, bottom):
        steps = functools.partial(step, rate=rate, bottom=bottom)
        (network, _), losses = jax.lax.scan(steps, (network, adam.init(network)), jnp.arange(epochs))
        return network, losses

    return jax.vmap(train_one)(networks, rates, bottoms)


def starts(layer: str, seeds: Iterable[int]) -> Network:
    """Return a stack of networks at their start, one for each seed."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *(start(layer, seed) for seed in seeds))


@jax.jit
def evaluate(networks: Network, points: Points) -> tuple[Array, Array, Array]:
    """Return the loss, the accuracy and the hidden layer's outputs of each network of a stack."""

    def evaluate_one(network):
        hidden, scores = forward(network, points.x)
        return cross_entropy(scores, points), (scores.argmax(axis=-1) == points.labels).mean(), hidden

    return jax.vmap(evaluate_one)(networks)
