"""Parameter-efficient fine-tuning of Flax NNX models: what replaces a layer, and what is trained."""

from surm_jax.peft.adapter import Adapter as Adapter
from surm_jax.peft.adapter import Rule as Rule
from surm_jax.peft.delta import AdapterParam as AdapterParam
from surm_jax.peft.describe import Description as Description
from surm_jax.peft.describe import describe as describe
from surm_jax.peft.files import load_adapter as load_adapter
from surm_jax.peft.files import save_adapter as save_adapter
from surm_jax.peft.fingerprint import check_fingerprint as check_fingerprint
from surm_jax.peft.fingerprint import fingerprint as fingerprint
from surm_jax.peft.hf import load_hf_adapter as load_hf_adapter
from surm_jax.peft.hf import save_hf_adapter as save_hf_adapter
from surm_jax.peft.inject import adapt as adapt
from surm_jax.peft.inject import adapted_layers as adapted_layers
from surm_jax.peft.inject import merge as merge
from surm_jax.peft.methods import C3A as C3A
from surm_jax.peft.methods import SELECTIONS as SELECTIONS
from surm_jax.peft.methods import UPDATES as UPDATES
from surm_jax.peft.methods import CirculantUpdate as CirculantUpdate
from surm_jax.peft.methods import LoRA as LoRA
from surm_jax.peft.methods import Update as Update
from surm_jax.peft.methods import make_update as make_update
