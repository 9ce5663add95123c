"""Parameter-efficient fine-tuning of Flax NNX models: what is put into a model, and what is trained."""

from surm_jax.peft.adapter import DEFAULT_NAME as DEFAULT_NAME
from surm_jax.peft.adapter import Adapter as Adapter
from surm_jax.peft.adapter import Rule as Rule
from surm_jax.peft.branch import Branch as Branch
from surm_jax.peft.context import adapter_dropout as adapter_dropout
from surm_jax.peft.delta import Delta as Delta
from surm_jax.peft.describe import Description as Description
from surm_jax.peft.describe import describe as describe
from surm_jax.peft.files import load_adapter as load_adapter
from surm_jax.peft.files import save_adapter as save_adapter
from surm_jax.peft.fingerprint import check_fingerprint as check_fingerprint
from surm_jax.peft.fingerprint import fingerprint as fingerprint
from surm_jax.peft.inject import adapt as adapt
from surm_jax.peft.inject import adapted_modules as adapted_modules
from surm_jax.peft.merge import merge as merge
from surm_jax.peft.methods import *  # noqa: F403
from surm_jax.peft.variables import AdapterConstant as AdapterConstant
from surm_jax.peft.variables import AdapterParam as AdapterParam
from surm_jax.peft.variables import AdapterScale as AdapterScale
