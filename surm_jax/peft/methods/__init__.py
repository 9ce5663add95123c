"""The methods by name. Importing a file registers what is in it."""

from surm_jax.peft.methods.base import ACTIVATIONS as ACTIVATIONS
from surm_jax.peft.methods.base import METHODS as METHODS
from surm_jax.peft.methods.base import Bottleneck as Bottleneck
from surm_jax.peft.methods.base import Method as Method
from surm_jax.peft.methods.base import Selection as Selection
from surm_jax.peft.methods.base import Update as Update
from surm_jax.peft.methods.base import make_method as make_method
from surm_jax.peft.methods.bottleneck import AdapterDrop as AdapterDrop
from surm_jax.peft.methods.bottleneck import BottleneckAdapter as BottleneckAdapter
from surm_jax.peft.methods.circulant import C3A as C3A
from surm_jax.peft.methods.circulant import CirculantAdapter as CirculantAdapter
from surm_jax.peft.methods.circulant import CirculantUpdate as CirculantUpdate
from surm_jax.peft.methods.hypercomplex import Compacter as Compacter
from surm_jax.peft.methods.hypercomplex import KAdaptation as KAdaptation
from surm_jax.peft.methods.hypercomplex import LoKr as LoKr
from surm_jax.peft.methods.kronecker import KroneckerAdapter as KroneckerAdapter
from surm_jax.peft.methods.kronecker import KroneckerUpdate as KroneckerUpdate
from surm_jax.peft.methods.lora import DoRA as DoRA
from surm_jax.peft.methods.lora import LoRA as LoRA
from surm_jax.peft.methods.lora import LoRAFix as LoRAFix
from surm_jax.peft.methods.lora import RankStabilizedLoRA as RankStabilizedLoRA
from surm_jax.peft.methods.low_displacement import LowDisplacementAdapter as LowDisplacementAdapter
from surm_jax.peft.methods.low_displacement import LowDisplacementUpdate as LowDisplacementUpdate
from surm_jax.peft.methods.mora import MoRA as MoRA
from surm_jax.peft.methods.selections import AttentionOnly as AttentionOnly
from surm_jax.peft.methods.selections import BitFit as BitFit
from surm_jax.peft.methods.selections import Full as Full
from surm_jax.peft.methods.selections import LinearProbe as LinearProbe
from surm_jax.peft.methods.selections import NormTuning as NormTuning
from surm_jax.peft.methods.structured import StructuredAdapter as StructuredAdapter
from surm_jax.peft.methods.structured import StructuredUpdate as StructuredUpdate
from surm_jax.peft.methods.toeplitz import AsymmetricToeplitzUpdate as AsymmetricToeplitzUpdate
from surm_jax.peft.methods.toeplitz import ToeplitzAdapter as ToeplitzAdapter
from surm_jax.peft.methods.toeplitz import ToeplitzUpdate as ToeplitzUpdate

__all__ = [
    "ACTIVATIONS",
    "C3A",
    "METHODS",
    "AdapterDrop",
    "AsymmetricToeplitzUpdate",
    "AttentionOnly",
    "BitFit",
    "Bottleneck",
    "BottleneckAdapter",
    "CirculantAdapter",
    "CirculantUpdate",
    "Compacter",
    "DoRA",
    "Full",
    "KAdaptation",
    "KroneckerAdapter",
    "KroneckerUpdate",
    "LinearProbe",
    "LoKr",
    "LoRA",
    "LoRAFix",
    "LowDisplacementAdapter",
    "LowDisplacementUpdate",
    "Method",
    "MoRA",
    "NormTuning",
    "RankStabilizedLoRA",
    "Selection",
    "StructuredAdapter",
    "StructuredUpdate",
    "ToeplitzAdapter",
    "ToeplitzUpdate",
    "Update",
    "make_method",
]
