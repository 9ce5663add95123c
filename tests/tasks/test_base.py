"""Test how the task class that accepts a data set is found."""

import pytest

from surm_jax.errors import UserError
from surm_jax.tasks import Glue, ImageClassification, base, register_task, task_for
from surm_jax.tasks.config import ModelConfig


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(base, "_TASKS", list(base._TASKS))


def test_data_belong_to_the_task_that_accepts_them():
    assert task_for("cifar10") is ImageClassification
    assert task_for("mine.npz") is ImageClassification
    assert task_for("glue/rte") is Glue


def test_a_task_that_comes_later_is_asked_first():
    @register_task
    class Masks(ImageClassification):
        @classmethod
        def accepts(cls, name):
            return name.endswith("_masks.npz")

    assert task_for("cells_masks.npz") is Masks
    assert task_for("cells.npz") is ImageClassification


def test_data_of_no_task_are_refused(monkeypatch):
    monkeypatch.setattr(base, "_TASKS", [Glue])
    with pytest.raises(UserError, match=r"no task accepts config\.data\.name=cifar10.*config\.plugins"):
        task_for("cifar10")


def test_decoders_are_found_for_prompts_only(shared):
    stories = {"variant": "", "checkpoint": str(shared / "data/weights/stories260k")}
    assert base.find_geometry(ModelConfig(**stories, dtype="bfloat16"), "prompts", 0).dtype == "bfloat16"
    variant = ModelConfig(variant="llama-2-7b", checkpoint="none", depth=2)
    assert base.find_geometry(variant, "prompts", 0).depth == 2
    with pytest.raises(UserError, match="stories260k: a llama continues text and has no classes"):
        base.find_geometry(ModelConfig(**stories), "text", 2)
    with pytest.raises(UserError, match="no model of text 'llama-2-7b'"):
        base.find_geometry(variant, "text", 2)
