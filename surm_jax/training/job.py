"""From a configuration to a model, its data and its adapter. What can be wrong is found here, before compilation."""

import dataclasses
import functools
import warnings
from pathlib import Path

import jax
from flax import nnx

from surm_jax import data
from surm_jax.errors import UserError
from surm_jax.models import TARGETS, ViT, ViTConfig
from surm_jax.paths import join
from surm_jax.peft import Adapter, Description, Rule, Selection, adapt, describe, make_method
from surm_jax.pretrained import image_normalization, load, locate, model_config
from surm_jax.training.config import GEOMETRY, PeftConfig, RunConfig
from surm_jax.training.mesh import make_mesh, replicated


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that is ready to be built.

    Attributes:
      config: the whole configuration.
      seed: of the head, the updates, the order of the data and dropout.
      mesh: the devices.
      dataset: training and test examples.
      holdout: training examples that are evaluated while training, or None; `dataset.train` is without them.
      vit: the model's geometry.
      checkpoint: the file or folder of the pretrained weights, or None for random ones.
      normalization: mean and standard deviation by channel that the weights expect, or None for pixels in [-1, 1].
    """

    config: RunConfig
    seed: int
    mesh: jax.sharding.Mesh
    dataset: data.ImageDataset
    holdout: data.ImageSource | None
    vit: ViTConfig
    checkpoint: Path | None
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None

    def base_model(self) -> nnx.Module:
        """Loads the pretrained model, with a fresh head, onto the mesh."""
        return load(
            functools.partial(_make_model, self.vit, self.seed),
            self.checkpoint,
            sharding=lambda path, shape: replicated(self.mesh),
        )

    def eval_batches(self, split: str) -> data.EvalBatches:
        """Returns the batches of a pass over "test" or "holdout"."""
        return data.eval_batches(
            self.holdout if split == "holdout" else self.dataset.test,
            batch_size=self.config.data.eval_batch_size,
            image_size=self.vit.image_size,
            normalization=self.normalization,
        )

    def adapt(self, model: nnx.Module) -> tuple[nnx.Module, Adapter]:
        """Returns the adapted model and its adapter."""
        return _adapt(model, self.config.peft, self.seed)


def prepare(config: RunConfig, seed: int) -> Job:
    """Checks all of a configuration against data, devices, files and the model's layers.

    Raises:
      UserError: for whatever does not fit.
    """
    mesh = make_mesh(
        config.mesh.data,
        {
            "config.data.batch_size / config.optim.accumulate": config.data.batch_size // config.optim.accumulate,
            "config.data.eval_batch_size": config.data.eval_batch_size,
        },
    )
    dataset = data.load(config.data.name, config.data.dir or None)
    train, holdout = data.hold_out(dataset.train, config.data.holdout)
    dataset = dataclasses.replace(dataset, train=train)
    if config.model.num_classes not in (0, len(dataset.classes)):
        raise UserError(
            f"config.model.num_classes={config.model.num_classes},"
            f" but {config.data.name} has {len(dataset.classes)} classes"
        )
    vit = vit_config(config, len(dataset.classes))
    dataset.require_channels(vit.channels)
    describe_model(config, vit)
    checkpoint = locate(config.model.checkpoint, config.model.variant or None)
    if checkpoint is None:
        warnings.warn(
            f"config.model.checkpoint=none: the {config.model.variant} model starts from RANDOM weights, not from"
            " pretrained ones. Frozen random layers adapt badly",
            stacklevel=2,
        )
    normalization = image_normalization(checkpoint)
    if normalization and len(normalization[0]) != vit.channels:
        raise UserError(
            f"{checkpoint} normalises images of {len(normalization[0])} channels, but the model reads {vit.channels}:"
            " its preprocessor_config.json must say image_mean and image_std of them"
        )
    return Job(config, seed, mesh, dataset, holdout, vit, checkpoint, normalization)


def vit_config(config: RunConfig, num_classes: int) -> ViTConfig:
    """Returns the geometry of the model with so many classes.

    Raises:
      UserError: if its fields do not fit together, or the checkpoint that is to say them cannot be read or holds
        another kind of model.
    """
    model = config.model
    if model.variant and (model.checkpoint.startswith("hf://") or Path(model.checkpoint).expanduser().is_dir()):
        raise UserError(
            f"config.model.checkpoint={model.checkpoint} says itself which model it holds, down to its numerics:"
            f" set config.model.variant to nothing (--config.model.variant=), not {model.variant!r}"
        )
    fields = {name: value for name in GEOMETRY if (value := getattr(model, name))}
    fields |= {name: getattr(model, name) for name in ViTConfig.RUNTIME_FIELDS}
    if model.variant:
        return ViTConfig.from_variant(model.variant, num_classes=num_classes, **fields)
    checkpoint = locate(config.model.checkpoint, config.model.variant or None)
    if checkpoint is None:
        raise UserError("config.model.variant is empty, but config.model.checkpoint=none says nothing of a model")
    kind, geometry = model_config(checkpoint, num_classes=num_classes, **fields)
    if kind is not ViT:
        raise UserError(f"{checkpoint} holds a {kind.__name__}, but this job needs a model of images")
    return geometry


def describe_model(config: RunConfig, vit: ViTConfig) -> Description:
    """Says what a configuration trains, without weights or data.

    Raises:
      UserError: if a rule or pattern matches nothing, or a layer that cannot be adapted.
    """
    abstract = nnx.eval_shape(functools.partial(_make_model, vit, 0))
    model, adapter = _adapt(abstract, config.peft, 0)
    _, trained, _ = nnx.split(model, adapter.trainable, ...)
    for path, variable in nnx.to_flat_state(trained):
        if variable.dtype != "float32":
            raise UserError(
                f"{join(path)} would be trained in {variable.dtype}, which loses small steps: leave"
                " config.model.param_dtype at float32, or train adapters alone"
            )
    description = describe(model, adapter)
    if not description.trainable:
        raise UserError(f"nothing would be trained: config.peft.train is empty, and {config.peft.method} adds nothing")
    return description


def _make_model(vit: ViTConfig, seed: int) -> ViT:
    return ViT(vit, rngs=nnx.Rngs(seed))


def _adapt(model: nnx.Module, peft: PeftConfig, seed: int) -> tuple[nnx.Module, Adapter]:
    # Not the stream that drew the model: its first keys would come again.
    rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(seed), 1))
    rules, train = rules_of(peft)
    return adapt(model, rules, train=train, execution=peft.execution, rngs=rngs)


def rules_of(peft: PeftConfig) -> tuple[list[Rule], tuple[str, ...]]:
    """Returns the rules of a configuration, and the patterns of what is trained besides."""

    def pattern(target: str) -> str:
        return TARGETS.get(target, target)

    rules = [
        Rule(pattern(r.target), make_method(r.method, dict(r.settings)) if r.method else None, r.parts, r.which)
        for r in peft.rules
    ]
    method = peft.methods[peft.method]
    if isinstance(method, Selection):
        if peft.target not in ("", "none"):
            raise UserError(
                f"config.peft.target={peft.target}, but {peft.method} trains parameters of the model by patterns of its"
                " own: leave target empty"
            )
        return rules, (*peft.train, *method.patterns)
    if peft.target != "none":
        rules.append(Rule(pattern(peft.target or method.target), method))
    return rules, peft.train
