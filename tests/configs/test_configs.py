"""Check that every file in configs/ gives a valid configuration, with which two small training steps run offline."""

import importlib
import itertools
from pathlib import Path

import pytest
from flax import nnx

from configs import bert_glue
from surm_jax import data
from surm_jax.errors import UserError
from surm_jax.models import Bert, ViTConfig
from surm_jax.paths import join
from surm_jax.peft import METHODS
from surm_jax.training.config import with_steps
from surm_jax.training.modes import describe_run, train_run
from surm_jax.training.optimizer import groups_of, learning_rates
from surm_jax.training.parsing import base_config, keys, parse
from surm_jax.training.setup import adapt_model
from tests.experiments import tiny_cifar
from tests.training import tiny_lm, tiny_text

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
SMALL_VIT = {"image_size": 16, "channels": 3, "patch_size": 8, "width": 12, "depth": 1, "heads": 3, "mlp_width": 24}
# What keeps the model small, the programs few and the network out; everything else is as in the file.
SMALL = {
    "bert_glue": {"optim.epochs": 0.0, "data.lengths": (128,)},
    "digits": {"data.holdout": 0},
    "llm_sft": {"optim.epochs": 0.0, "data.lengths": (16, 32), "data.holdout": 6},
    "vit_cifar": {"model.variant": "small", "model.checkpoint": "none", "data.holdout": 0},
}
# What writes the prepared data set of a configuration, a small one under its own name, into a folder.
ON_DISK = {"bert_glue": lambda folder: tiny_text.write_task(folder, "rte", 0), "vit_cifar": tiny_cifar.write_data}


def get_config(name):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "bert"
    tiny_text.write_bert(folder, tiny_text.BERT)
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return tiny_lm.write_files(tmp_path_factory.mktemp("lm"))


def test_every_configuration_is_tested():
    assert set(NAMES) == set(SMALL)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_valid_and_has_every_key(name):
    config = get_config(name)
    parse(config)
    assert set(keys(config)) == set(keys(base_config()))
    # Each call gives one of its own.
    config.optim.steps = 1
    assert get_config(name).optim.steps != 1


@pytest.mark.parametrize("name", NAMES)
def test_its_docstring_has_the_command(name):
    module = importlib.import_module(f"configs.{name}")
    assert "python launch.py" in module.__doc__
    assert f"--config=configs/{name}.py" in module.__doc__ or name == "digits"


@pytest.mark.parametrize("name", NAMES)
def test_it_describes_what_it_trains(name, bert, decoder, capsys):
    config = get_config(name)
    _use_small_model(config, bert, decoder)
    config.update_from_flattened_dict(SMALL["llm_sft"] if name == "llm_sft" else {})
    config.model.num_classes = config.model.num_classes or 5
    describe_run(parse(config))
    assert "trainable: " in capsys.readouterr().out


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:config.model.checkpoint=none")
def test_two_steps(name, bert, decoder, tmp_path, monkeypatch):
    monkeypatch.setitem(ViTConfig.VARIANTS, "small", SMALL_VIT)
    config = get_config(name)
    _use_small_model(config, bert, decoder)
    config.update_from_flattened_dict(
        {"data.batch_size": 8, "data.eval_batch_size": 8, "optim.steps": 2, "optim.warmup_ratio": 0.0, **SMALL[name]}
    )
    if name in ON_DISK:
        config.data.dir = str(tmp_path / "tfds")
        ON_DISK[name](tmp_path / "tfds")
    result = train_run(parse(config), tmp_path / "run")
    assert result["steps"] == 2
    assert 0 <= result["metrics"]["holdout_accuracy" if name == "llm_sft" else "test_accuracy"] <= 1
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_size > 0


def _use_small_model(config, bert, decoder):
    """Replace a model of the Hub, or one that a person must name, by a small one in a folder."""
    if config.model.checkpoint.startswith("hf://"):
        config.model.checkpoint = str(bert)
    if config.data.name == "FILE.jsonl":
        config.model.checkpoint, config.data.name = str(decoder / "model"), str(decoder / "lines.jsonl")


@pytest.mark.parametrize(
    ("task", "method"),
    list(itertools.product(bert_glue.TASKS, ("circulant_adapter", "lora", "full", "linear_probe"))),
)
def test_every_task_of_glue_with_a_few_methods(task, method):
    config = parse(bert_glue.get_config(f"task={task},method={method}"))
    assert (config.data.name, config.peft.method) == (f"glue/{task}", method)
    assert data.glue_task(config.data.name) is data.GLUE_TASKS[task]
    rates = learning_rates(config.optim, method, ["head/kernel", "blocks/0/norm1/scale"])
    assert set(rates.values()) == {3e-5 if method == "full" else 2e-3}
    assert config.optim.epochs == (3 if method == "full" else bert_glue.TASKS[task].epochs)


def test_the_default_is_the_papers_rte():
    config = parse(bert_glue.get_config())
    assert bert_glue.get_config() == bert_glue.get_config("method=circulant_adapter,task=rte")
    # 80 passes over 2,490 examples in batches of 64.
    assert with_steps(config, 2490).optim.steps == 3113
    assert config.peft.methods["circulant_adapter"].dropout == 0.15


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_settings_on_glue(method):
    config = parse(bert_glue.get_config(f"method={method}"))
    assert config.optim.learning_rate[method] > 0


@pytest.mark.parametrize("method", ["circulant_adapter", "bottleneck", "lora", "dora", "full"])
def test_no_bias_and_no_norm_decays_and_all_else_does(method):
    config = parse(bert_glue.get_config(f"task=rte,method={method}"))
    model = nnx.eval_shape(lambda: Bert(tiny_text.BERT, rngs=nnx.Rngs(0)))
    model, adapter = adapt_model(model, config.peft, 0)
    _, trained, _ = nnx.split(model, adapter.trainable, ...)
    paths = [join(path) for path, _ in nnx.to_flat_state(trained)]
    norms = [join(path) for path, module in nnx.iter_graph(model) if isinstance(module, nnx.LayerNorm)]
    assert len(norms) == 3
    # DoRA's magnitudes are norms too, of the columns of weights.
    spared = {path for path in paths if path.endswith(("bias", "magnitude")) or path.rpartition("/")[0] in norms}
    assert len(spared) > 1 or method == "lora"
    assert method != "full" or {f"{norm}/{name}" for norm in norms for name in ("scale", "bias")} < spared
    for path, group in groups_of(paths, config.optim.groups).items():
        decay = 0.0 if path in spared else (0.01 if method == "full" else 0.25)
        assert (path, getattr(config.optim.groups, group).weight_decay) == (path, decay)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("task=rt", "task must be one of .*'rte'.*, got 'rt'; did you mean 'rte'"),
        ("method=circulent", "method must be one of .*, got 'circulent'; did you mean 'circulant'"),
        ("tasks=rte", "option must be one of .*, got 'tasks'; did you mean 'task'"),
        ("rte", r"option must be one of \('task', 'method'\), got 'rte'"),
        ("task=", "task has no value: write task=..."),
    ],
)
def test_mistyped_options_of_glue(options, message):
    with pytest.raises(UserError, match=message):
        bert_glue.get_config(options)
