import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest

from surm_jax.errors import UserError
from surm_jax.models import MODELS, BertConfig, Config, Model, ViTConfig, register_model
from surm_jax.pretrained.hf import ARCHITECTURES, architecture_of, register_architecture
from surm_jax.pretrained.hf.architecture import our_activation


@dataclass(frozen=True, kw_only=True)
class LonelyConfig(Config):
    """The configuration of a model that transformers does not have."""


class Lonely(Model):
    """A model that transformers does not have."""

    config_class: ClassVar[type[Config]] = LonelyConfig
    reads: ClassVar[str] = "images"


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """Remove the models and architectures that a test registers when it ends."""
    monkeypatch.setattr("surm_jax.models.base.MODELS", {**MODELS})
    monkeypatch.setattr("surm_jax.pretrained.hf.architecture.ARCHITECTURES", {**ARCHITECTURES})


def test_each_architecture_is_found_by_its_model_type():
    assert {name: architecture.model_type for name, architecture in ARCHITECTURES.items()} == {
        name: name for name in ARCHITECTURES
    }


def test_a_model_is_written_as_the_architecture_that_its_configuration_chooses():
    assert architecture_of(ViTConfig.from_variant("B/16", num_classes=10)).model_type == "vit"
    assert architecture_of(ViTConfig.from_variant("B/16", num_classes=10, distillation=True)).model_type == "deit"
    assert architecture_of(BertConfig.from_variant("tiny")).model_type == "bert"


def test_a_model_that_transformers_does_not_have():
    register_model(Lonely)
    with pytest.raises(UserError, match="no model_type of transformers is registered for a Lonely: write it with"):
        architecture_of(LonelyConfig())


def test_another_model_of_the_same_model_type_is_refused():
    register_architecture(ARCHITECTURES["bert"])
    with pytest.raises(UserError, match="the model_type 'bert' already belongs to Bert"):
        register_architecture(dataclasses.replace(ARCHITECTURES["bert"], model=Lonely))


def test_a_path_without_a_name():
    with pytest.raises(UserError, match="blocks/0/gate has no name in transformers' bert"):
        ARCHITECTURES["bert"].tensor_name(BertConfig.from_variant("tiny"), "blocks/0/gate")


def test_an_unknown_activation_names_the_nearest():
    assert our_activation("vit", "gelu_new") == "gelu_tanh"
    with pytest.raises(UserError, match=r"hidden_act = 'gelu_nev', but there are .*did you mean 'gelu_new'"):
        our_activation("vit", "gelu_nev")
