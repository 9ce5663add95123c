"""The methods by name: updates of kernels, and selections of what is there. Importing a file registers its updates."""

from surm_jax.peft.methods.base import UPDATES as UPDATES
from surm_jax.peft.methods.base import Update as Update
from surm_jax.peft.methods.base import make_update as make_update
from surm_jax.peft.methods.circulant import C3A as C3A
from surm_jax.peft.methods.circulant import CirculantUpdate as CirculantUpdate
from surm_jax.peft.methods.lora import LoRA as LoRA
from surm_jax.peft.methods.selections import SELECTIONS as SELECTIONS
