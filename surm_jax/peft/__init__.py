"""Parameter-efficient fine-tuning of Flax NNX models: methods, and functions to adapt, save, load and merge.

Importing this package also imports every file of `surm_jax.peft.methods` and of its folders. This registers their
methods in `METHODS`.
"""

from surm_jax.peft.adapt import adapt
from surm_jax.peft.adapter import DEFAULT_NAME, Adapter, Rule
from surm_jax.peft.bank import load_bank
from surm_jax.peft.check import check
from surm_jax.peft.convert import combine, convert
from surm_jax.peft.describe import Description, describe
from surm_jax.peft.files import load_adapter, save_adapter
from surm_jax.peft.fingerprint import check_fingerprint, fingerprint
from surm_jax.peft.hf import load_peft, save_peft
from surm_jax.peft.kernels.parameter import register_kernel
from surm_jax.peft.lifecycle import delete, kernel_change, set_active, set_scale
from surm_jax.peft.merge import merge
from surm_jax.peft.methods.base import METHODS, Method, PartMethod, make_method
from surm_jax.peft.methods.bottleneck import AdapterDrop, BottleneckBranch
from surm_jax.peft.methods.branch import Branch
from surm_jax.peft.methods.entrywise.abba import ABBA
from surm_jax.peft.methods.entrywise.learnable_rank import LearnableRank
from surm_jax.peft.methods.entrywise.modulated import HiRA, ModulatedUpdate
from surm_jax.peft.methods.entrywise.sine import SineLoRA
from surm_jax.peft.methods.entrywise.smoa import SMoA
from surm_jax.peft.methods.matrices.block_low_rank import GraLoRA
from surm_jax.peft.methods.matrices.circulant import C3A, CirculantBranch, CirculantUpdate
from surm_jax.peft.methods.matrices.diagonal_circulant import CDVFT
from surm_jax.peft.methods.matrices.hypercomplex import Compacter, KAdaptation, LoKr
from surm_jax.peft.methods.matrices.khatri_rao import KRAdapter
from surm_jax.peft.methods.matrices.kronecker import KroneckerBranch, KroneckerUpdate
from surm_jax.peft.methods.matrices.lora import DoRA, LoRA, LoRAFix, RankStabilizedLoRA
from surm_jax.peft.methods.matrices.low_displacement import LowDisplacementBranch, LowDisplacementUpdate
from surm_jax.peft.methods.matrices.monarch import MoRe
from surm_jax.peft.methods.matrices.mora import MoRA
from surm_jax.peft.methods.matrices.structured import StructuredBranch, StructuredUpdate
from surm_jax.peft.methods.matrices.toeplitz import AsymmetricToeplitzUpdate, ToeplitzBranch, ToeplitzUpdate
from surm_jax.peft.methods.selections import AttentionOnly, BitFit, Full, LinearProbe, NormTuning, Selection
from surm_jax.peft.methods.settings import at_least, one_of
from surm_jax.peft.methods.update import Update
from surm_jax.peft.only import only
from surm_jax.peft.optax_mask import path_mask, train_only
from surm_jax.peft.owners import adapter_names
from surm_jax.peft.parts.banked import adapter_of_examples
from surm_jax.peft.parts.base import (
    AdapterConstant,
    AdapterParam,
    AdapterScale,
    AttachedPart,
    KernelPart,
    OutputPart,
    Part,
    Place,
    iter_parts,
)
from surm_jax.peft.parts.branch import ACTIVATIONS, BranchPart
from surm_jax.peft.parts.dropout import adapter_dropout
from surm_jax.peft.parts.entrywise import EntrywisePart
from surm_jax.peft.parts.update import NormalizedPart, UpdatePart

__all__ = [
    "ABBA",
    "ACTIVATIONS",
    "C3A",
    "CDVFT",
    "DEFAULT_NAME",
    "METHODS",
    "Adapter",
    "AdapterConstant",
    "AdapterDrop",
    "AdapterParam",
    "AdapterScale",
    "AsymmetricToeplitzUpdate",
    "AttachedPart",
    "AttentionOnly",
    "BitFit",
    "BottleneckBranch",
    "Branch",
    "BranchPart",
    "CirculantBranch",
    "CirculantUpdate",
    "Compacter",
    "Description",
    "DoRA",
    "EntrywisePart",
    "Full",
    "GraLoRA",
    "HiRA",
    "KAdaptation",
    "KRAdapter",
    "KernelPart",
    "KroneckerBranch",
    "KroneckerUpdate",
    "LearnableRank",
    "LinearProbe",
    "LoKr",
    "LoRA",
    "LoRAFix",
    "LowDisplacementBranch",
    "LowDisplacementUpdate",
    "Method",
    "MoRA",
    "MoRe",
    "ModulatedUpdate",
    "NormTuning",
    "NormalizedPart",
    "OutputPart",
    "Part",
    "PartMethod",
    "Place",
    "RankStabilizedLoRA",
    "Rule",
    "SMoA",
    "Selection",
    "SineLoRA",
    "StructuredBranch",
    "StructuredUpdate",
    "ToeplitzBranch",
    "ToeplitzUpdate",
    "Update",
    "UpdatePart",
    "adapt",
    "adapter_dropout",
    "adapter_names",
    "adapter_of_examples",
    "at_least",
    "check",
    "check_fingerprint",
    "combine",
    "convert",
    "delete",
    "describe",
    "fingerprint",
    "iter_parts",
    "kernel_change",
    "load_adapter",
    "load_bank",
    "load_peft",
    "make_method",
    "merge",
    "one_of",
    "only",
    "path_mask",
    "register_kernel",
    "save_adapter",
    "save_peft",
    "set_active",
    "set_scale",
    "train_only",
]
