"""For every registered method, what it must compute (by the NumPy functions of `oracles.py`) and what it trains."""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import nnx

from surm_jax import peft
from surm_jax.peft import Adapter, Rule, adapt
from tests.peft.models import MODELS, base, parameters, part_arrays, perturb
from tests.peft.oracles import (
    Arrays,
    Shapes,
    biased,
    block_low_rank,
    circulant,
    gelu_tanh,
    khatri_rao,
    khatri_rao_shapes,
    kronecker,
    kronecker_shapes,
    learned_function,
    low_displacement,
    low_rank,
    low_rank_kronecker,
    low_rank_kronecker_shapes,
    low_rank_shapes,
    monarch,
    spectral_blocks,
    spectral_shapes,
    surm,
    symmetric_toeplitz,
    toeplitz,
    toeplitz_product,
    waisted,
    waisted_shapes,
    weight_decomposed,
)
from tests.structured.families.test_tiled import mora_dense


@dataclasses.dataclass(frozen=True)
class UpdateCase:
    """An update method, and the properties that the tests expect of it.

    Attributes:
        method: An instance in which every setting except `learn_alpha` differs from its default.
        zero: The names of the arrays that start at zero. All other arrays must not contain a zero at the start.
        stored: A function of m and n that returns a dictionary from the name of each array to its shape in an adapter
            file, for a layer whose kernel has the shape (m, n).
        change: A function of alpha, the arrays and the kernel (in, out) that returns the kernel's change.
        constant: The names of the arrays that are not trained.
        early: The names of the arrays that do not start at zero, but still have a non-zero gradient in the first step.
        given: The names of the arrays whose start is not random. They may be alike in several layers and hold zeros.
    """

    method: peft.Update
    zero: set[str]
    stored: Callable[[int, int], Shapes]
    change: Callable[[float, Arrays, np.ndarray], np.ndarray]
    constant: frozenset[str] = frozenset()
    early: frozenset[str] = frozenset()
    given: frozenset[str] = frozenset()
    slot = "delta"

    def places(self, model: str) -> dict[str, tuple[int, int]]:
        """Return a dictionary from the path of each adapted layer to the shape (m, n) of its kernel."""
        return MODELS[model].shapes

    def rule(self, model: str) -> Rule:
        return Rule(MODELS[model].target, self.method)


@dataclasses.dataclass(frozen=True)
class BranchCase:
    """A branch method, and the properties that the tests expect of it.

    Attributes:
        method: An instance in which every setting except `bias` differs from its default.
        zero: The names of the arrays that start at zero. All other arrays must not contain a zero at the start.
        stored: A function of a module's number of output features that returns a dictionary from the name of each array
            to its shape in an adapter file.
        branch: A function of the arrays and the output y, (..., width), that returns the term added to y.
        late: The names of the arrays that start at zero, and whose gradient is zero in the first step.
        wants: A function of a module's path that returns whether the method adapts this module if the rule matches it.
    """

    method: peft.Branch
    zero: set[str]
    stored: Callable[[int], Shapes]
    branch: Callable[[Arrays, np.ndarray], np.ndarray]
    late: frozenset[str] = frozenset()
    wants: Callable[[str], bool] = lambda path: True
    constant = early = given = frozenset()
    slot = "branch"

    def places(self, model: str) -> dict[str, tuple[int]]:
        return {path: (width,) for path, width in MODELS[model].widths.items() if self.wants(path)}

    def rule(self, model: str) -> Rule:
        return Rule(MODELS[model].branch_target, self.method)


@dataclasses.dataclass(frozen=True)
class SelectionCase:
    """A method that trains existing parameters, and the properties that the tests expect of it.

    Attributes:
        method: An instance of the method.
        chosen: A function of a parameter's path that returns whether the method itself selects this parameter.
    """

    method: peft.Selection
    chosen: Callable[[str], bool]


DROP = {"dropout": 0.4}
UPDATES = {
    "circulant": UpdateCase(
        peft.CirculantUpdate(alpha=0.7, scale=0.5, **DROP),
        {"r1"},
        lambda m, n: {"c": (max(m, n),)},
        lambda alpha, a, W: alpha * circulant(a["r1"] * a["r2"] if "r1" in a else a["c"], *W.shape),
    ),
    "c3a": UpdateCase(
        peft.C3A(alpha=3.0, block=2, **DROP),
        {"c"},
        lambda m, n: {"c": (m // 2, n // 2, 2)},
        lambda alpha, a, W: alpha / len(W) * np.block([[scipy.linalg.circulant(c).T for c in row] for row in a["c"]]),
    ),
    "kronecker": UpdateCase(
        peft.KroneckerUpdate(alpha=0.8, scale=0.9, **DROP),
        {"A"},
        kronecker_shapes,
        lambda alpha, a, W: alpha * kronecker(a),
    ),
    "lora": UpdateCase(
        peft.LoRA(alpha=0.6, rank=2, **DROP), {"up"}, low_rank_shapes, lambda alpha, a, W: alpha / 2 * low_rank(a)
    ),
    "rslora": UpdateCase(
        peft.RankStabilizedLoRA(alpha=0.6, rank=2, **DROP),
        {"up"},
        low_rank_shapes,
        lambda alpha, a, W: alpha / np.sqrt(2) * low_rank(a),
    ),
    "lora_fix": UpdateCase(
        peft.LoRAFix(alpha=0.9, rank=2, **DROP),
        {"up"},
        low_rank_shapes,
        lambda alpha, a, W: alpha / 2 * low_rank(a),
        constant=frozenset({"down"}),
    ),
    "dora": UpdateCase(
        peft.DoRA(alpha=0.6, rank=2, **DROP),
        {"up"},
        lambda m, n: {**low_rank_shapes(m, n), "magnitude": (n,)},
        lambda alpha, a, W: weight_decomposed(alpha / 2, a, W),
        early=frozenset({"magnitude"}),
    ),
    "low_displacement": UpdateCase(
        peft.LowDisplacementUpdate(alpha=0.5, rank=2, scale=0.3, **DROP),
        {"G"},
        lambda m, n: {"G": (max(m, n), 2), "H": (max(m, n), 2)},
        lambda alpha, a, W: alpha * low_displacement(a, *W.shape),
    ),
    "toeplitz": UpdateCase(
        peft.ToeplitzUpdate(alpha=0.4, scale=0.3, **DROP),
        {"t1"},
        lambda m, n: {"t1": (max(m, n),), "t2": (max(m, n),)},
        lambda alpha, a, W: alpha * symmetric_toeplitz(a, *W.shape),
    ),
    "toeplitz_asymmetric": UpdateCase(
        peft.AsymmetricToeplitzUpdate(alpha=0.4, scale=0.3, **DROP),
        {"t1"},
        lambda m, n: {"t1": (m + max(m, n) - 1,), "t2": (max(m, n) + n - 1,)},
        lambda alpha, a, W: alpha * toeplitz(a, *W.shape),
    ),
    "lokr": UpdateCase(
        peft.LoKr(alpha=0.8, rank=2, divisor=2, **DROP),
        {"A"},
        lambda m, n: low_rank_kronecker_shapes(m, n, 1, 2, 2),
        lambda alpha, a, W: alpha / 2 * (kronecker(a) if "B" in a else low_rank_kronecker(a)),
    ),
    "kadaptation": UpdateCase(
        peft.KAdaptation(alpha=0.7, terms=2, rank=2, scale=0.5, **DROP),
        {"up"},
        lambda m, n: low_rank_kronecker_shapes(m, n, 2, 2, 2),
        lambda alpha, a, W: alpha * low_rank_kronecker(a),
    ),
    "mora": UpdateCase(
        peft.MoRA(alpha=0.6, rank=1, compress="contiguous", decompress="truncate", rounding="down", **DROP),
        {"M"},
        lambda m, n: {"M": (int((m + n) ** 0.5),) * 2},
        lambda alpha, a, W: alpha * mora_dense(a["M"], W.shape, "contiguous", "truncate"),
    ),
    "more": UpdateCase(
        peft.MoRe(alpha=0.6, rank=3, blocks=2, **DROP),
        {"L"},
        lambda m, n: {"R": (2, m // 2, 3), "L": (2, 3, n // 2)},
        lambda alpha, a, W: alpha * monarch(a),
    ),
    "gralora": UpdateCase(
        peft.GraLoRA(alpha=0.6, rank=2, blocks=1, **DROP),
        {"up"},
        lambda m, n: {"down": (1, 1, m, 2), "up": (1, 1, 2, n)},
        lambda alpha, a, W: alpha / 2 * block_low_rank(a),
    ),
    "cdvft": UpdateCase(
        peft.CDVFT(alpha=0.6, scale=0.5, **DROP),
        {"c"},
        lambda m, n: {"a": (m,), "b": (n,), "c": (max(m, n),)},
        lambda alpha, a, W: alpha * a["a"][:, None] * circulant(a["c"], *W.shape) * a["b"],
    ),
    "kradapter": UpdateCase(
        peft.KRAdapter(alpha=0.7, **DROP),
        {"U"},
        khatri_rao_shapes,
        lambda alpha, a, W: alpha * khatri_rao(a, *W.shape),
    ),
    "hira": UpdateCase(
        peft.HiRA(alpha=0.6, rank=2, **DROP), {"up"}, low_rank_shapes, lambda alpha, a, W: alpha * W * low_rank(a)
    ),
    "modulated": UpdateCase(
        peft.ModulatedUpdate(alpha=0.5, family="CirculantPair + LowRank", rank=2, f=0.3, scale=0.4, **DROP),
        {"terms_0_r1", "terms_1_up"},
        lambda m, n: {"terms_0_c": (max(m, n),), **{f"terms_1_{k}": v for k, v in low_rank_shapes(m, n).items()}},
        lambda alpha, a, W: (
            alpha * W * (circulant(a["terms_0_r1"] * a["terms_0_r2"], *W.shape) + a["terms_1_down"] @ a["terms_1_up"])
        ),
    ),
    "smoa": UpdateCase(
        peft.SMoA(alpha=1.5, rank=4, blocks=3, **DROP),
        {f"terms_{k}_matrix_up" for k in range(3)},
        spectral_shapes,
        lambda alpha, a, W: alpha / 4 * spectral_blocks(a, W),
        constant=frozenset({"row_places", "column_places"}),
        given=frozenset({"row_places", "column_places"}),
    ),
    "sine_lora": UpdateCase(
        peft.SineLoRA(alpha=5.0, rank=2, omega=3.0, **DROP),
        {"up"},
        low_rank_shapes,
        lambda alpha, a, W: alpha / 2 * np.sin(3 * low_rank(a)) / np.sqrt(len(W)),
    ),
    "lr_lora": UpdateCase(
        peft.LearnableRank(alpha=0.9, rank=2, **DROP),
        {"up"},
        lambda m, n: {**low_rank_shapes(m, n), "a": (8,), "width": (8,)},
        lambda alpha, a, W: alpha / 2 * learned_function(a),
        early=frozenset({"a", "width"}),
        given=frozenset({"a", "width"}),
    ),
    "abba": UpdateCase(
        peft.ABBA(alpha=0.8, first_rank=1, rank=2, **DROP),
        {"up"},
        lambda m, n: {**low_rank_shapes(m, n), "first_down": (m, 1), "first_up": (1, n)},
        lambda alpha, a, W: alpha * (a["first_down"] @ a["first_up"]) * low_rank(a),
    ),
    "structured": UpdateCase(
        peft.StructuredUpdate(alpha=0.5, family="CirculantPair + LowRank", rank=2, f=0.3, scale=0.4, **DROP),
        {"terms_0_r1", "terms_1_up"},
        lambda m, n: {"terms_0_c": (max(m, n),), **{f"terms_1_{k}": v for k, v in low_rank_shapes(m, n).items()}},
        lambda alpha, a, W: (
            alpha * (circulant(a["terms_0_r1"] * a["terms_0_r2"], *W.shape) + a["terms_1_down"] @ a["terms_1_up"])
        ),
    ),
}

BRANCHES = {
    "circulant_adapter": BranchCase(
        peft.CirculantBranch(alpha=0.7, scale=0.5, activation="tanh", **DROP),
        {"down/r1", "bias"},
        lambda d: biased({"c": (d,)}, d),
        surm(0.7, np.tanh, lambda a, m, n: circulant(a["r1"] * a["r2"], m, n)),
    ),
    "kronecker_adapter": BranchCase(
        peft.KroneckerBranch(alpha=0.8, scale=0.5, activation="gelu_tanh", **DROP),
        {"down/A", "bias"},
        lambda d: biased(kronecker_shapes(d, d), d),
        surm(0.8, gelu_tanh, lambda a, m, n: kronecker(a)),
    ),
    "low_displacement_adapter": BranchCase(
        peft.LowDisplacementBranch(alpha=0.5, rank=2, scale=0.3, activation="tanh", **DROP),
        {"down/G", "bias"},
        lambda d: biased({"G": (d, 2), "H": (d, 2)}, d),
        surm(0.5, np.tanh, low_displacement),
    ),
    "toeplitz_adapter": BranchCase(
        peft.ToeplitzBranch(alpha=0.6, scale=0.3, activation="gelu_tanh", **DROP),
        {"down/t1", "bias"},
        lambda d: biased({"t1": (d,), "t2": (d,)}, d),
        surm(0.6, gelu_tanh, symmetric_toeplitz),
    ),
    "bottleneck": BranchCase(
        peft.BottleneckBranch(alpha=0.7, waist=3, scale=0.5, activation="tanh", **DROP),
        {"down_bias", "up/W", "bias"},
        lambda d: waisted_shapes(d, 3),
        waisted(0.7, np.tanh),
        late=frozenset({"down_bias"}),
    ),
    "adapter_drop": BranchCase(
        peft.AdapterDrop(alpha=0.7, waist=5, scale=0.5, skip=1, activation="relu", **DROP),
        {"down_bias", "up/W", "bias"},
        lambda d: waisted_shapes(d, 5),
        waisted(0.7, lambda x: np.maximum(x, 0)),
        late=frozenset({"down_bias"}),
        wants=lambda path: not path.startswith("blocks/0"),
    ),
    "compacter": BranchCase(
        peft.Compacter(alpha=0.7, terms=1, reduction=2, rank=2, scale=0.5, activation="tanh", **DROP),
        {"down_bias", "up/A", "bias"},
        lambda d: {
            **{f"down/{k}": v for k, v in low_rank_kronecker_shapes(d, d // 2, 1, 1, 2).items()},
            **{f"up/{k}": v for k, v in low_rank_kronecker_shapes(d // 2, d, 1, 1, 2).items()},
            **{"down_bias": (d // 2,), "bias": (d,)},
        },
        waisted(0.7, np.tanh, low_rank_kronecker),
        late=frozenset({"down_bias"}),
    ),
    "structured_adapter": BranchCase(
        peft.StructuredBranch(
            alpha=0.6, family="Toeplitz @ SymmetricToeplitz", rank=2, f=0.3, scale=0.4, activation="tanh", **DROP
        ),
        {"down/factors_0_t", "bias"},
        lambda d: biased({"factors_0_t": (2 * d - 1,), "factors_1_t": (d,)}, d),
        surm(0.6, np.tanh, toeplitz_product),
    ),
}

NORMS = ("norm", "norm1", "norm2", "embed_norm")
SELECTIONS = {
    "linear_probe": SelectionCase(peft.LinearProbe(), lambda path: False),
    "full": SelectionCase(peft.Full(), lambda path: True),
    "attention_only": SelectionCase(peft.AttentionOnly(), lambda path: "/attention/" in path),
    "bitfit": SelectionCase(peft.BitFit(), lambda path: path.split("/")[-1] == "bias"),
    "norm_tuning": SelectionCase(peft.NormTuning(), lambda path: path.split("/")[-2:-1] in [[name] for name in NORMS]),
}

ADDED = UPDATES | BRANCHES
CASES = ADDED | SELECTIONS

# The models on which each method is tested by itself. A circulant update, LoRA and a circulant branch are tested on
# every kind of model. DoRA reads the kernel, so it is also tested on kernels in bfloat16 and with several axes. The
# other methods differ only in their matrices and initial values, for which one small model is enough. In ViT and BERT,
# all methods are also tested together (`methods/test_together.py`). The model "deep" is a ViT too.
OURS = ("vit", "bert")
THOROUGH = {
    "circulant": tuple(name for name in MODELS if name != "vit"),
    "lora": tuple(name for name in MODELS if name != "vit"),
    "dora": ("mlp", "bfloat16_kernels", "axes"),
    "hira": ("mlp", "bfloat16_kernels", "bfloat16_compute", "axes"),
    "circulant_adapter": tuple(name for name, case in MODELS.items() if case.widths and name != "vit"),
    "adapter_drop": ("mlp", "deep"),  # Its first block gets no adapter.
}
EVERY = [(model, method) for method in ADDED for model in THOROUGH.get(method, ("mlp",))]
EVERY_UPDATE = [(model, method) for model, method in EVERY if method in UPDATES]
EVERY_BRANCH = [(model, method) for model, method in EVERY if method in BRANCHES]

# The fast test run contains these methods on the smallest models, and DoRA also on kernels in bfloat16.
QUICK = frozenset({"circulant", "lora", "dora", "circulant_adapter", "bottleneck", "bitfit"})
SMALL = frozenset({"mlp", "vit"})


def is_small(case: str | tuple[str, str]) -> bool:
    """Return whether a case is for a small model. A case is a method or a pair (model, method)."""
    return isinstance(case, str) or case[0] in SMALL or case == ("bfloat16_kernels", "dora")


def is_quick(case: str | tuple[str, str]) -> bool:
    """Return whether the fast test run includes a case, the name of a method or a pair (model, method)."""
    return is_small(case) and (case if isinstance(case, str) else case[1]) in QUICK


@functools.cache
def fresh(model: str, method: str) -> tuple[nnx.Module, Adapter]:
    """Return a model with a new adapter, as at the start of training, and the adapter."""
    return adapt(base(model), [CASES[method].rule(model)], train=MODELS[model].train, rngs=nnx.Rngs(1))


@functools.cache
def trained(model: str, method: str) -> tuple[nnx.Module, Adapter]:
    """Return a model and an adapter as `fresh`, with noise added to every trained variable, as if after training."""
    adapted, adapter = fresh(model, method)
    return perturb(adapted, adapter), adapter


def changes(model: str, method: str, adapted: nnx.Module, name: str = "default") -> dict[str, np.ndarray]:
    """Return the change that the adapter must make to the kernel of each adapted layer, by the path of the layer.

    It is computed by NumPy in float64 from the arrays of the adapter.

    Args:
        model: The name of the base model.
        method: The name of the update method.
        adapted: The adapted model, which has the arrays.
        name: The name of the adapter in `adapted`.
    """
    case, weights, found = UPDATES[method], parameters(base(model)), {}
    for path, shape in case.places(model).items():
        arrays = part_arrays(adapted, path, "delta", name)
        kernel = weights[f"{path}/kernel".removeprefix("/")].astype(np.float64).reshape(shape)
        alpha = float(arrays.pop("alpha", case.method.alpha))
        found[path] = case.change(alpha, arrays, kernel)
    return found


def bare(model: str, adapted: nnx.Module, added: dict[str, np.ndarray] | None = None) -> nnx.Module:
    """Return the model without its adapters, with the values that its own parameters have in `adapted`.

    Args:
        model: The name of the base model.
        adapted: The adapted model.
        added: Dense matrices to add to the kernels, by the path of the layer.
    """
    tuned, graphdef, state = parameters(adapted), *nnx.split(base(model))
    flat = []
    for path, variable in nnx.to_flat_state(state):
        where = "/".join(map(str, path))
        value, layer = tuned[where], where.removesuffix("kernel").removesuffix("/")
        if where.endswith("kernel") and layer in (added or {}):
            # Keep the sum in float32, because rounding it to bfloat16, as merging does, would lose small changes.
            value = (value.astype(np.float64) + added[layer].reshape(value.shape)).astype(np.float32)
        flat.append((path, variable.replace(jnp.asarray(value))))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def with_oracles(model: nnx.Module, branches: dict[str, list[Callable[[np.ndarray], np.ndarray]]]) -> nnx.Module:
    """Make modules add NumPy functions of their output to it, in place, and return the model.

    The functions run outside of JAX, so the model cannot be compiled.

    Args:
        model: The model.
        branches: A dictionary from the path of a module to its functions.
    """

    def oracle_class(cls, functions):
        def call(self, *args, **kwargs):
            y = cls.__call__(self, *args, **kwargs)
            moved = sum(function(np.asarray(y).astype(np.float64)) for function in functions)
            return y + jnp.asarray(moved, y.dtype)

        return type(f"Oracle{cls.__name__}", (cls,), {"__call__": call})

    for path, module in nnx.iter_modules(model):
        if functions := branches.get("/".join(map(str, path))):
            object.__setattr__(module, "__class__", oracle_class(type(module), functions))
    return model


def expected_output(model: str, methods: dict[str, str], adapted: nnx.Module, x: jnp.ndarray) -> jnp.ndarray:
    """Return the output that an adapted model must have, computed with NumPy functions instead of adapters.

    Args:
        model: The name of the base model.
        methods: The name of the method of each adapter, by the name of the adapter.
        adapted: The adapted model, which has the arrays of all adapters.
        x: The input.
    """
    added: dict[str, np.ndarray] = {}
    branches: dict[str, list[Callable[[np.ndarray], np.ndarray]]] = {}
    for name, method in methods.items():
        if method in UPDATES:
            for path, change in changes(model, method, adapted, name).items():
                added[path] = added.get(path, 0) + change
            continue
        case = BRANCHES[method]
        for path in case.places(model):
            arrays = part_arrays(adapted, path, "branch", name)
            branches.setdefault(path, []).append(functools.partial(case.branch, arrays))
    return with_oracles(bare(model, adapted, added), branches)(x)
