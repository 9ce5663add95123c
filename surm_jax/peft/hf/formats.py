"""The formats of peft that have a counterpart here, by `peft_type`."""

from collections.abc import Mapping
from types import MappingProxyType

from surm_jax.peft.hf.c3a import C3AFormat
from surm_jax.peft.hf.format import Format
from surm_jax.peft.hf.lokr import LoKrFormat
from surm_jax.peft.hf.lora import LoRAFormat

FORMATS: Mapping[str, Format] = MappingProxyType({"LORA": LoRAFormat(), "C3A": C3AFormat(), "LOKR": LoKrFormat()})
