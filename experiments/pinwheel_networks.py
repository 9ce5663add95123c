"""The data and the networks of the pinwheel experiment: points on spokes, and networks with a structured hidden kernel.

All networks with the same kind of hidden kernel are trained side by side in one program.
"""

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
# For each kind of hidden kernel, the function that makes it, and the standard deviation of its parameters. With this
# deviation the entries of the kernel have a standard deviation of about 1/8.
LAYERS = {
    "dense": (structured.Dense.init, WIDTH**-0.5),
    "lora": (functools.partial(structured.LowRank.init, rank=1), WIDTH**-0.25),
    "circulant": (structured.CirculantPair.init, WIDTH**-0.25),
    "symmetric_toeplitz": (structured.SymmetricToeplitzPair.init, WIDTH**-0.5),
    "toeplitz": (structured.Toeplitz.init, WIDTH**-0.5),
}


class Points(NamedTuple):
    """Labelled points of the plane.

    Attributes:
        x: The coordinates, in float32.
        labels: The number of the spoke that each point lies on.
    """

    x: Float[np.ndarray, "points 2"]
    labels: Int[np.ndarray, " points"]


class Network(NamedTuple):
    """The parameters of one network, or of several networks stacked along a new first axis.

    Attributes:
        bottom: The kernel of the bottom layer.
        bottom_bias: The bias of the bottom layer.
        hidden: The structured kernel of the hidden layer.
        hidden_bias: The bias of the hidden layer.
        top: The kernel of the top layer, which computes the logits.
        top_bias: The bias of the top layer.
    """

    bottom: Float[Array, "2 width"]
    bottom_bias: Float[Array, " width"]
    hidden: structured.StructuredMatrix
    hidden_bias: Float[Array, " width"]
    top: Float[Array, "width spokes"]
    top_bias: Float[Array, " spokes"]


def pinwheel(draws: np.random.Generator, per_spoke: int) -> Points:
    """Return random points on a pinwheel.

    They are drawn as by Johnson et al. (2016), arXiv 1603.06277. The position along a spoke is Gaussian with mean 1 and
    standard deviation 0.3, the position across it with mean 0 and standard deviation 0.1. Each point is then rotated
    about the origin by exp(position along the spoke) / 4, which bends the spokes.

    Args:
        draws: The random generator.
        per_spoke: The number of points on each spoke.
    """
    labels = np.repeat(np.arange(SPOKES), per_spoke)
    along, across = draws.normal(size=(2, labels.size)) * [[0.3], [0.1]] + [[1.0], [0.0]]
    angle = 2 * np.pi * labels / SPOKES + np.exp(along) / 4
    x, y = along * np.cos(angle) - across * np.sin(angle), along * np.sin(angle) + across * np.cos(angle)
    return Points(np.stack([x, y], axis=1).astype(np.float32), labels)


def start(layer: str, seed: int) -> Network:
    """Return a network with random initial parameters.

    The parameters of the bottom and the top layer depend only on the seed, not on the kind of hidden kernel.

    Args:
        layer: The kind of hidden kernel, a key of `LAYERS`.
        seed: The seed.
    """
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
    """Return the outputs of the hidden layer, (points, width), and the logits, (points, spokes), of one network."""
    hidden = jnp.tanh(x @ network.bottom + network.bottom_bias[None])
    # For a matrix as small as this, forming the dense matrix costs less than Fourier transforms of the activations.
    hidden = jnp.tanh(structured.matmul(hidden, network.hidden, execution="dense") + network.hidden_bias[None])
    return hidden, hidden @ network.top + network.top_bias[None]


def cross_entropy(scores: Float[Array, "points spokes"], points: Points) -> Float[Array, ""]:
    """Return the cross-entropy loss of some logits, averaged over the points."""
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
    """Train several networks side by side in one program. They may differ in seed, learning rate and bottom layer.

    Args:
        networks: The initial parameters of all networks, stacked.
        rates: The initial learning rate of each network. It decays to zero on a cosine schedule.
        bottoms: For each network, a factor for the steps of its bottom layer: 0 freezes the layer and 1 trains it.
        points: The training points.
        epochs: The number of steps. Each step uses all points.

    Returns:
        The trained networks, stacked, and the loss of each network before every step.
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
    """Return networks with random initial parameters (`start`), one for each seed, stacked along a new first axis."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *(start(layer, seed) for seed in seeds))


@jax.jit
def evaluate(networks: Network, points: Points) -> tuple[Array, Array, Array]:
    """Return the loss, the accuracy and the hidden layer's outputs on some points, for each of several networks."""

    def evaluate_one(network):
        hidden, scores = forward(network, points.x)
        return cross_entropy(scores, points), (scores.argmax(axis=-1) == points.labels).mean(), hidden

    return jax.vmap(evaluate_one)(networks)
