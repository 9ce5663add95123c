"""Parameter-efficient fine-tuning of Flax NNX models: what is put into a model, and what is trained."""

from surm_jax.peft.adapt import adapt as adapt
from surm_jax.peft.adapt import adapted_modules as adapted_modules
from surm_jax.peft.adapter import DEFAULT_NAME as DEFAULT_NAME
from surm_jax.peft.adapter import Adapter as Adapter
from surm_jax.peft.adapter import Rule as Rule
from surm_jax.peft.bank import load_bank as load_bank
from surm_jax.peft.convert import combine as combine
from surm_jax.peft.convert import convert as convert
from surm_jax.peft.describe import Description as Description
from surm_jax.peft.describe import describe as describe
from surm_jax.peft.files import load_adapter as load_adapter
from surm_jax.peft.files import save_adapter as save_adapter
from surm_jax.peft.fingerprint import check_fingerprint as check_fingerprint
from surm_jax.peft.fingerprint import fingerprint as fingerprint
from surm_jax.peft.hf import load_hf_adapter as load_hf_adapter
from surm_jax.peft.hf import save_hf_adapter as save_hf_adapter
from surm_jax.peft.lifecycle import adapter_names as adapter_names
from surm_jax.peft.lifecycle import delete as delete
from surm_jax.peft.lifecycle import set_active as set_active
from surm_jax.peft.lifecycle import set_scale as set_scale
from surm_jax.peft.merge import merge as merge
from surm_jax.peft.methods import *  # noqa: F403
from surm_jax.peft.optax_mask import path_mask as path_mask
from surm_jax.peft.optax_mask import train_only as train_only
from surm_jax.peft.parts.branch import Branch as Branch
from surm_jax.peft.parts.context import adapter_dropout as adapter_dropout
from surm_jax.peft.parts.context import adapter_of_examples as adapter_of_examples
from surm_jax.peft.parts.update import Delta as Delta
from surm_jax.peft.parts.variables import AdapterConstant as AdapterConstant
from surm_jax.peft.parts.variables import AdapterParam as AdapterParam
from surm_jax.peft.parts.variables import AdapterScale as AdapterScale
