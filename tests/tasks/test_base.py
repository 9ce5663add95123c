"""Tests of the registry of tasks, which finds the task class that accepts a data set."""

import pytest

from surm_jax.errors import UserError
from surm_jax.tasks import Glue, ImageClassification, base, register_task, task_for
from surm_jax.tasks.config import DataConfig


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(base, "_TASKS", list(base._TASKS))


def test_data_belong_to_the_task_that_accepts_them():
    assert task_for(DataConfig(name="cifar10")) is ImageClassification
    assert task_for(DataConfig(name="mine.npz")) is ImageClassification
    assert task_for(DataConfig(name="glue/rte")) is Glue


def test_a_task_that_comes_later_is_asked_first():
    @register_task
    class Masks(ImageClassification):
        @classmethod
        def accepts(cls, config):
            return config.name.endswith("_masks.npz")

    assert task_for(DataConfig(name="cells_masks.npz")) is Masks
    assert task_for(DataConfig(name="cells.npz")) is ImageClassification


def test_data_of_no_task_are_refused(monkeypatch):
    monkeypatch.setattr(base, "_TASKS", [Glue])
    with pytest.raises(UserError, match=r"no task accepts config\.data\.name=cifar10.*config\.plugins"):
        task_for(DataConfig(name="cifar10"))
