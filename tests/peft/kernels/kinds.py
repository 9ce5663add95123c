"""One module for every kind of kernel, with an input, and where the entries of its matrices are in its kernel."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from surm_jax.peft import Rule, register_kernel
from tests.peft.models import materialize


@dataclasses.dataclass(frozen=True)
class KindCase:
    """A module with a kernel.

    Attributes:
        make: A function that returns the module.
        inputs: The shape of the input.
        matrix: The shape of its matrices, (*stack, *entries, in_features, out_features).
        place: A function that puts matrices of this shape into the form of the kernel, written with NumPy alone.
        parameter: The name of the kernel.
        target: The target of the rule, which may name the parameter.
        axes: The axes of the rule.
        call: A function of the module and the input that returns an output.
        tokens: The number of different inputs, if they are whole numbers.
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    inputs: tuple[int, ...]
    matrix: tuple[int, ...]
    place: Callable[[Any], Any]
    parameter: str = "kernel"
    target: str = ""
    axes: str = ""
    call: Callable[[Any, jax.Array], jax.Array] = lambda module, x: module(x)
    tokens: int = 0

    def rule(self, method) -> Rule:
        return Rule(self.target, method, axes=self.axes)

    def module(self) -> Any:
        return materialize(lambda: self.make(nnx.Rngs(0)))

    def x(self) -> jax.Array:
        rng = np.random.default_rng(1)
        if self.tokens:
            return jnp.asarray(rng.integers(0, self.tokens, self.inputs), jnp.int32)
        return jnp.asarray(rng.normal(size=self.inputs), jnp.float32)


def stack(make, *sizes):
    """Return a function that makes a stack of layers with `nnx.vmap`, with one axis for each of the sizes."""
    for size in reversed(sizes):
        inner = make
        make = lambda rngs, inner=inner, size=size: nnx.vmap(lambda key: inner(nnx.Rngs(key)))(  # noqa: E731
            jax.random.split(rngs.params(), size)
        )
    return make


def scanned(module, x):
    """Return the output of layers one after another, each with a residual connection."""
    return nnx.scan(lambda x, layer: x + layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, module)


def scanned_twice(module, x):
    return nnx.scan(lambda x, layers: scanned(layers, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, module)


def einsum(equation, kernel, bias=None):
    return lambda rngs: nnx.Einsum(equation, kernel, bias, rngs=rngs)


class Stranger(nnx.Module):
    """A class as another library may have it. It uses its weight twice, and through a method of its own."""

    def __init__(self, rngs):
        self.weight = nnx.Param(rngs.params.normal((6, 4)))

    def normalised(self):
        return self.weight / jnp.linalg.norm(self.weight[...], axis=1, keepdims=True)

    def __call__(self, x):
        return jnp.tanh(x @ self.weight) + x @ self.normalised()


class Experts(nnx.Module):
    """A mixture of experts that multiplies inside its own `__call__`."""

    def __init__(self, rngs):
        self.up = nnx.Param(rngs.params.normal((3, 6, 4)))

    def __call__(self, x):
        return jnp.tanh(jnp.einsum("bd,edf->bef", x, self.up[...])).sum(1)


class Projection(nnx.Module):
    """A class whose `__call__` is an einsum with its weight, such as those of tunix."""

    def __init__(self, rngs):
        self.equation = "btd,sdnh->sbtnh"
        self.w = nnx.Param(rngs.params.normal((2, 6, 2, 2)))

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w) + 1.0


class Reader(nnx.Linear):
    def __call__(self, x):
        return x @ self.kernel[...]


register_kernel(Stranger, "weight")
register_kernel(Projection, "w", einsum=lambda module: module.equation)

KINDS = {
    "stranger": KindCase(Stranger, (2, 6), (6, 4), lambda m: m, parameter="weight"),
    "experts": KindCase(Experts, (2, 6), (3, 6, 4), lambda m: m, parameter="up", target="up", axes="bio"),
    "projection": KindCase(
        Projection, (2, 3, 6), (6, 8), lambda m: m.reshape(6, 2, 2, 2).transpose(1, 0, 2, 3), parameter="w"
    ),
    "reader": KindCase(lambda rngs: Reader(6, 4, rngs=rngs), (2, 6), (6, 4), lambda m: m, target="kernel"),
    "stacked_stranger": KindCase(
        stack(Stranger, 3),
        (2, 6),
        (3, 6, 4),
        lambda m: m,
        parameter="weight",
        call=lambda module, x: nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(module, x),
    ),
    "conv_transpose": KindCase(
        lambda rngs: nnx.ConvTranspose(2, 3, (3,), strides=2, transpose_kernel=True, rngs=rngs),
        (2, 5, 2),
        (6, 3),
        lambda m: m.reshape(3, 2, 3).transpose(0, 2, 1),
    ),
    "linear": KindCase(lambda rngs: nnx.Linear(6, 4, rngs=rngs), (2, 3, 6), (6, 4), lambda m: m),
    "general": KindCase(
        lambda rngs: nnx.LinearGeneral((2, 3), (2, 2), axis=(0, -1), rngs=rngs),
        (2, 5, 3),
        (6, 4),
        lambda m: m.reshape(2, 3, 2, 2),
    ),
    "general_batch": KindCase(
        lambda rngs: nnx.LinearGeneral(6, (2, 2), axis=-1, batch_axis={0: 3}, rngs=rngs),
        (3, 5, 6),
        (3, 6, 4),
        lambda m: m.reshape(3, 6, 2, 2),
    ),
    "einsum": KindCase(
        einsum("btd,dnh->btnh", (6, 2, 2), (2, 2)), (2, 3, 6), (6, 4), lambda m: m.reshape(6, 2, 2)
    ),
    "einsum_output": KindCase(
        einsum("...nh,nhd->...d", (2, 3, 4), (4,)), (2, 5, 2, 3), (6, 4), lambda m: m.reshape(2, 3, 4)
    ),
    "einsum_fused": KindCase(
        einsum("btd,sdnh->sbtnh", (3, 6, 2, 2)),
        (2, 3, 6),
        (6, 12),
        lambda m: m.reshape(6, 3, 2, 2).transpose(1, 0, 2, 3),
    ),
    "einsum_batch": KindCase(
        einsum("bed,edf->bef", (3, 6, 4), (3, 4)), (5, 3, 6), (3, 6, 4), lambda m: m
    ),
    "lora_linear": KindCase(
        lambda rngs: nnx.LoRALinear(6, 4, lora_rank=1, rngs=rngs), (2, 6), (6, 4), lambda m: m
    ),
    "conv": KindCase(
        lambda rngs: nnx.Conv(3, 4, (3, 3), strides=2, padding="CIRCULAR", rngs=rngs),
        (2, 5, 6, 3),
        (27, 4),
        lambda m: m.reshape(3, 3, 3, 4),
    ),
    "conv_point": KindCase(
        lambda rngs: nnx.Conv(6, 4, (1, 1), rngs=rngs), (2, 3, 3, 6), (6, 4), lambda m: m.reshape(1, 1, 6, 4)
    ),
    "conv_causal": KindCase(
        lambda rngs: nnx.Conv(2, 4, 3, padding="CAUSAL", kernel_dilation=2, rngs=rngs),
        (2, 3, 7, 2),
        (6, 4),
        lambda m: m.reshape(3, 2, 4),
    ),
    "conv_padded": KindCase(
        lambda rngs: nnx.Conv(2, 4, (2, 3), padding=((0, 1), (2, 1)), input_dilation=2, use_bias=False, rngs=rngs),
        (3, 4, 2),
        (12, 4),
        lambda m: m.reshape(2, 3, 2, 4),
    ),
    "conv_groups": KindCase(
        lambda rngs: nnx.Conv(4, 6, (3,), feature_group_count=2, rngs=rngs),
        (2, 7, 4),
        (2, 6, 3),
        lambda m: m.reshape(2, 3, 2, 3).transpose(1, 2, 0, 3).reshape(3, 2, 6),
    ),
    "embed": KindCase(
        lambda rngs: nnx.Embed(6, 4, rngs=rngs), (3, 5), (6, 4), lambda m: m, parameter="embedding", tokens=6
    ),
    "embed_tied": KindCase(
        lambda rngs: nnx.Embed(6, 4, rngs=rngs),
        (3, 5),
        (6, 4),
        lambda m: m,
        parameter="embedding",
        call=lambda module, x: module.attend(jnp.tanh(module(x))),
        tokens=6,
    ),
    "stacked": KindCase(
        stack(lambda rngs: nnx.Linear(6, 6, rngs=rngs), 3), (2, 6), (3, 6, 6), lambda m: m, call=scanned
    ),
    "stacked_einsum": KindCase(
        stack(lambda rngs: nnx.Einsum("ned,edf->nef", (2, 4, 4), rngs=rngs), 3),
        (2, 2, 4),
        (3, 2, 4, 4),
        lambda m: m,
        call=scanned,
    ),
    "stacked_twice": KindCase(
        stack(lambda rngs: nnx.Linear(4, 4, rngs=rngs), 2, 3), (2, 4), (2, 3, 4, 4), lambda m: m, call=scanned_twice
    ),
}  # fmt: skip
