"""Adapters for trees of parameters without modules, such as those of Linen, Haiku and Equinox, or of a checkpoint.

A model that is a function of its parameters stays as it is. It gets `apply(params, adapter)` in place of `params`: the
tree in which each adapted kernel W is replaced by `W + M`. This costs one copy of the adapted kernels. Only the adapter
is differentiated and optimised.

Rules, methods, initial values and files are those of `surm_jax.adapt`. A rule names a layer, which is a node of the
tree with an array `kernel` or `embedding`, or it names any other array by its path:

>>> import jax.numpy as jnp
>>> from surm_jax import LoRA, Rule, tree
>>> params = {"query": {"kernel": jnp.ones((8, 8)), "bias": jnp.zeros(8)}, "out": {"w": jnp.ones((8, 8))}}
>>> adapter = tree.adapt(params, [Rule("query", LoRA(rank=2)), Rule("out/w", LoRA(rank=2))], rng=0)
>>> effective = tree.apply(params, adapter)
>>> bool((effective["out"]["w"] == params["out"]["w"]).all())  # At first M is zero.
True
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from surm_jax import peft
from surm_jax.errors import UserError, did_you_mean
from surm_jax.paths import join
from surm_jax.peft.adapt import base_parameters, claim_trained
from surm_jax.peft.adapter import Adapter, Rule
from surm_jax.peft.kernels import KINDS
from surm_jax.peft.kernels.parameter import ParameterKind, added_at
from surm_jax.peft.lifecycle import kernel_at
from surm_jax.peft.parts.base import KERNEL, AdapterParam, iter_parts
from surm_jax.peft.parts.layers import attach


class Node(nnx.Module):
    """A node of a tree of parameters, as a module. Its attributes are its entries."""


class KernelNode(Node):
    """A node with an array `kernel`."""


class EmbeddingNode(Node):
    """A node with an array `embedding`."""


def _axes(parameter: str, module: Any) -> str:
    return "io" if len(vars(module)[parameter].shape) == 2 else ""


_NODES: dict[str, type[Node]] = {"kernel": KernelNode, "embedding": EmbeddingNode}
for _name, _cls in _NODES.items():
    KINDS[_cls] = ParameterKind(_name, functools.partial(_axes, _name))


@dataclasses.dataclass(frozen=True)
class AdaptedArray:
    """An array of a tree that an adapter changes.

    Attributes:
        layer: The path of the layer in the tree, or of the array if the rule named it.
        array: The path of the array.
        axes: A letter for each axis of the array in one layer, as in `Rule.axes`.
        part: The graph definition of the part that is added. Its arrays are in `TreeAdapter.parts`.
    """

    layer: str
    array: str
    axes: str
    part: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TreeAdapter:
    """The adapter of a tree of parameters: a pytree of small arrays, for `jax.grad`, optax and checkpoints.

    Attributes:
        parts: For the path of each adapted layer, a dictionary of the arrays that are added there. Constants have the
            gradient zero, and `mask` excludes them.
        trained: The arrays of the tree that are themselves trained, by path.
        places: The arrays of the tree that are changed.
        recipe: The rules, and the patterns of the trained arrays.
    """

    parts: dict[str, Any]
    trained: dict[str, Any]
    places: tuple[AdaptedArray, ...] = dataclasses.field(metadata={"static": True}, repr=False)
    recipe: Adapter = dataclasses.field(metadata={"static": True}, repr=False)

    def divide(self, path: str) -> tuple["TreeAdapter", "TreeAdapter"]:
        """Return the adapter for the subtree at a path, such as a stack of layers, and the adapter for all the rest.

        In the body of a scan, `apply` then changes the kernels of one layer at a time. The arrays of the subtree's
        adapter have the leading axis of the stack, as its parameters do.

        Raises:
            UserError: If nothing is adapted or trained in the subtree.
        """
        prefix = f"{path}/"
        if not any(place.array.startswith(prefix) for place in self.places) and not any(
            name.startswith(prefix) for name in self.trained
        ):
            known = [place.array for place in self.places]
            raise UserError(f"the adapter changes nothing in {path!r}{did_you_mean(path, known)} (it changes {known})")

        def part(inside: bool) -> "TreeAdapter":
            strip = (lambda name: name.removeprefix(prefix)) if inside else (lambda name: name)
            places = [place for place in self.places if place.array.startswith(prefix) == inside]
            moved = (dataclasses.replace(p, layer=strip(p.layer), array=strip(p.array)) for p in places)
            return TreeAdapter(
                {strip(place.layer): self.parts[place.layer] for place in places},
                {strip(name): array for name, array in self.trained.items() if name.startswith(prefix) == inside},
                tuple(moved),
                self.recipe,
            )

        return part(True), part(False)


def adapt(params: Any, rules: Sequence[Rule], *, train: Sequence[str] = (), rng: int | jax.Array) -> TreeAdapter:
    """Return an adapter for a tree of parameters, which at first changes nothing.

    An array of two axes is a matrix (in, out). For others the rule says which axes are rows and columns: with
    `axes="ioo"` for the query kernel of a Linen attention layer (width, heads, head size), `"oi"` for a weight of
    Equinox or PyTorch (out, in), and `"io"` for a stack of kernels (layers, in, out) with one update for each layer.

    Args:
        params: A pytree of arrays, which may be abstract. The path of an array is the sequence of its keys, joined by
            `/`.
        rules: Each rule assigns a method that updates kernels to the layers or arrays that match its target.
        train: Regular expressions for the paths of arrays that are themselves trained, such as `head/.*`.
        rng: The seed or key of the random initial values.

    Raises:
        UserError: If a rule or a pattern matches nothing; if an array cannot be adapted, as one of half precision, in
            which the sum `W + M` would round the update away; or if a method adds to the output of modules.
    """
    for rule in rules if isinstance(rules, Sequence) else ():
        if isinstance(rule, Rule) and rule.method and rule.method.part.slot != KERNEL:
            raise UserError(
                f"the rule {rule.target!r} has the method {rule.method.name}, which adds to the output of a module, but"
                " a tree of parameters has no modules: use a method that updates kernels, such as LoRA"
            )
    return _collected(*peft.adapt(_nodes(params), rules, train=train, rngs=nnx.Rngs(rng)))


def apply(params: Any, adapter: TreeAdapter) -> Any:
    """Return the effective parameters: a tree like `params`, with `W + M` in place of each adapted kernel W.

    The result is differentiable with respect to the adapter only. The gradient of `W + M` is reduced to that of the
    update in the backward pass, and nothing else of the size of a kernel is kept for it. In a scan over a stack of
    layers, call this function in the body with the parameters and the adapter of one layer (`TreeAdapter.divide`):
    otherwise the gradients of all kernels of the stack exist at the same time.

    Raises:
        UserError: If the tree lacks an array that the adapter changes or trains, or if one has another shape.
    """
    leaves, treedef = _leaves(jax.lax.stop_gradient(params))
    for path, array in adapter.trained.items():
        _require(path, leaves)
        if array.shape != leaves[path].shape:
            raise UserError(f"{path} has the shape {leaves[path].shape}, but the adapter trained {array.shape}")
        leaves[path] = array
    for place in adapter.places:
        _require(place.array, leaves)
        part = nnx.merge(place.part, adapter.parts[place.layer])
        constants = nnx.state(part, nnx.Not(nnx.OfType(AdapterParam)))
        nnx.update(part, jax.lax.stop_gradient(constants))
        try:
            leaves[place.array] = leaves[place.array] + added_at(part, leaves[place.array], place.axes)
        except UserError as error:
            raise UserError(f"{place.array} {error}") from None
    return jax.tree.unflatten(treedef, leaves.values())


def mask(adapter: TreeAdapter) -> TreeAdapter:
    """Return `True` for the arrays of an adapter that are trained, and `False` for its constants, in the same tree.

    `optax.masked(optax.adamw(1e-3), tree.mask)` optimises the trained arrays only.
    """
    parts = {}
    for place in adapter.places:
        state = nnx.state(nnx.merge(place.part, jax.tree.map(lambda leaf: 0, adapter.parts[place.layer])))
        parts[place.layer] = nnx.to_pure_dict(nnx.map_state(lambda _, v: v.replace(isinstance(v, AdapterParam)), state))
    return dataclasses.replace(adapter, parts=parts, trained=dict.fromkeys(adapter.trained, True))


def merge(params: Any, adapter: TreeAdapter) -> tuple[Any, float]:
    """Return a tree like `params` with the updates added to the kernels in float64, and the largest deviation from it.

    The deviation comes from rounding to the dtype of the kernels, as in `surm_jax.merge`.

    Raises:
        UserError: If an update or a kernel is not finite, or if the tree is not that of the adapter.
    """
    model, deviation = peft.merge(_adapted(params, adapter))
    leaves, treedef = _leaves(params)
    merged = base_parameters(model)
    return jax.tree.unflatten(treedef, [merged[path].get_value() for path in leaves]), deviation


def save(folder: str | os.PathLike, params: Any, adapter: TreeAdapter) -> int:
    """Write an adapter to a folder, in the format of `surm_jax.save_adapter`, and return the number of bytes.

    `surm_jax.load_adapter` reads the folder for an NNX model with parameters of the same paths and values.

    Raises:
        UserError: If the folder cannot be written, or if `params` are no longer those that were adapted.
    """
    return peft.save_adapter(folder, _adapted(params, adapter), adapter.recipe)


def load(folder: str | os.PathLike, params: Any) -> TreeAdapter:
    """Read an adapter for a tree of parameters from a folder that `save` or `surm_jax.save_adapter` wrote.

    Raises:
        UserError: If a file is missing or damaged, or if the adapter was trained on other parameters.
    """
    return _collected(*peft.load_adapter(folder, _nodes(params)))


def _leaves(params: Any) -> tuple[dict[str, Any], Any]:
    """Return the arrays of a tree by path, and its structure."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    if len(leaves) < len(pairs):
        raise UserError("two arrays of the tree have the same path, when keys are joined by '/': rename a key")
    for path, leaf in leaves.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise UserError(f"{path} must be an array, got {leaf!r:.80}: take the arrays of the tree only")
    return leaves, treedef


def _require(path: str, leaves: dict[str, Any]) -> None:
    if path not in leaves:
        raise UserError(f"the tree has no {path}{did_you_mean(path, leaves)}: the adapter is for another tree")


def _nodes(params: Any) -> Node:
    """Return the arrays of a tree as modules, in which they have the same paths."""
    leaves, _ = _leaves(params)
    names: dict[str, set[str]] = {}
    for path in leaves:
        node, _, name = path.rpartition("/")
        names.setdefault(node, set()).add(name)

    @functools.cache
    def node_at(path: str) -> Node:
        cls = next((cls for name, cls in _NODES.items() if name in names.get(path, ())), Node)
        node = cls()
        if path:
            parent, _, name = path.rpartition("/")
            _put(node_at(parent), path, name, node)
        return node

    for path, leaf in leaves.items():
        parent, _, name = path.rpartition("/")
        _put(node_at(parent), path, name, nnx.Param(leaf))
    return node_at("")


def _put(parent: Node, path: str, name: str, value: Any) -> None:
    if name in vars(parent):
        raise UserError(f"{path} is both an array and a node of the tree, when keys are joined by '/': rename a key")
    setattr(parent, name, value)


def _adapted(params: Any, adapter: TreeAdapter) -> Node:
    """Return a tree and its adapter as an adapted model."""
    model = _nodes(params)
    modules = {join(path): module for path, module in nnx.iter_modules(model)}
    for place in adapter.places:
        part = nnx.merge(place.part, adapter.parts[place.layer])
        path = place.layer.rpartition("/")[0] if part.parameter else place.layer
        if path not in modules or not hasattr(modules[path], place.array.rpartition("/")[2]):
            _require(place.array, _leaves(params)[0])
        attach(modules[path], adapter.recipe.name, part)
    for path, variable in claim_trained(model, adapter.recipe).items():
        variable.set_value(adapter.trained[path])
    return model


def _collected(model: Any, recipe: Adapter) -> TreeAdapter:
    """Return the adapter of an adapted model of nodes."""
    parts, places = {}, []
    for row in iter_parts(model):
        graphdef, state = nnx.split(row.part)
        parts[row.path] = nnx.to_pure_dict(state)
        parameter = kernel_at(row).parameter
        array = row.path if row.part.parameter else join([*filter(None, [row.path]), parameter])
        places.append(AdaptedArray(row.path, array, row.part.axes, graphdef))
    state = nnx.state(model, nnx.All(recipe.trainable, nnx.Not(nnx.OfType(AdapterParam))))
    trained = {join(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}
    return TreeAdapter(parts, trained, tuple(places), recipe)
