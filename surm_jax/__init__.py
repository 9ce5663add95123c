"""Parameter-efficient fine-tuning with structured matrices (SURM, arXiv 2406.17740) in JAX and Flax NNX.

The example adds a trainable circulant matrix to each query, key and value layer of a pretrained model, and saves the
result. The head of the model is trained too, and all other parameters are frozen.

    import surm_jax
    from flax import nnx

    rules = [surm_jax.Rule(r".*/(query|key|value)", surm_jax.CirculantUpdate())]
    model, adapter = surm_jax.adapt(model, rules, train=["head/.*"], rngs=nnx.Rngs(0))
    graphdef, trainable, frozen = nnx.split(model, adapter.trainable, ...)
    # Train `trainable` here with jax.grad and optax. README.md prints a step for models with dropout and BatchNorm too.
    surm_jax.save_adapter("my_adapter", nnx.merge(graphdef, trainable, frozen), adapter)
"""

# ruff: noqa: E402 - The versions are checked before the import of a library that is too old fails.

from surm_jax.versions import require_versions

require_versions()

from surm_jax import tree as tree
from surm_jax.errors import UserError as UserError
from surm_jax.generation import Sampling as Sampling
from surm_jax.generation import generate as generate
from surm_jax.peft import METHODS as METHODS
from surm_jax.peft import Adapter as Adapter
from surm_jax.peft import CirculantUpdate as CirculantUpdate
from surm_jax.peft import LoRA as LoRA
from surm_jax.peft import Rule as Rule
from surm_jax.peft import adapt as adapt
from surm_jax.peft import adapter_dropout as adapter_dropout
from surm_jax.peft import adapter_names as adapter_names
from surm_jax.peft import adapter_of_examples as adapter_of_examples
from surm_jax.peft import check as check
from surm_jax.peft import combine as combine
from surm_jax.peft import convert as convert
from surm_jax.peft import delete as delete
from surm_jax.peft import describe as describe
from surm_jax.peft import load_adapter as load_adapter
from surm_jax.peft import load_bank as load_bank
from surm_jax.peft import load_peft as load_peft
from surm_jax.peft import make_method as make_method
from surm_jax.peft import merge as merge
from surm_jax.peft import only as only
from surm_jax.peft import path_mask as path_mask
from surm_jax.peft import register_kernel as register_kernel
from surm_jax.peft import save_adapter as save_adapter
from surm_jax.peft import save_peft as save_peft
from surm_jax.peft import set_active as set_active
from surm_jax.peft import set_scale as set_scale
from surm_jax.peft import train_only as train_only
