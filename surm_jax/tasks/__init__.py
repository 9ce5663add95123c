"""Tasks: what a run learns. A task has data, a model, an objective and scores, behind one protocol."""

from surm_jax.tasks.base import Batch, Forward, Questions, Task, register_task, task_for
from surm_jax.tasks.glue import Glue
from surm_jax.tasks.image_classification import ImageClassification

__all__ = ["Batch", "Forward", "Glue", "ImageClassification", "Questions", "Task", "register_task", "task_for"]
