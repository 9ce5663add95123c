"""Tasks, which define what a run learns: each brings together a data set, a model, a loss and metrics."""

from surm_jax.tasks.base import Batch, Forward, Questions, Task, register_task, task_for
from surm_jax.tasks.causal_lm import CausalLM
from surm_jax.tasks.glue import Glue
from surm_jax.tasks.image_classification import ImageClassification

__all__ = [
    "Batch",
    "CausalLM",
    "Forward",
    "Glue",
    "ImageClassification",
    "Questions",
    "Task",
    "register_task",
    "task_for",
]
