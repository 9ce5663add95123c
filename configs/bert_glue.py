r"""The configuration of a job that trains BERT on a task of the GLUE benchmark with any method.

    python launch.py --config=configs/bert_glue.py:task=rte,method=circulant_adapter \
        --config.data.dir=FOLDER_OF_PREPARED_TFDS_SETS

The tasks are cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte and wnli. The base model is `bert-base-uncased` from the
Hugging Face Hub. The option `--config.model.checkpoint=` chooses another BERT or RoBERTa model. Its value is
hf://owner/name for a model of the Hub, or the path of a folder to which the library transformers has saved both the
model and its tokeniser.

The settings are those of SURM (arXiv 2406.17740, section 5): AdamW, warm-up over 6 % of the steps, linear decay, texts
of up to 128 tokens, batch size 64 (32 for the baselines of that paper), and no weight decay on biases and norms. Weight
decay 0.25 and dropout 0.15 come from the authors' script for a circulant adapter on the task RTE. They are not tuned
for other tasks and methods. The methods `full` and `attention_only` train the pretrained weights directly. They use 3
epochs, the learning rate 3e-5 and weight decay 0.01 instead, as in BERT (arXiv 1810.04805).
"""

from typing import NamedTuple

import ml_collections

from surm_jax.errors import UserError, require_one_of
from surm_jax.peft import METHODS
from surm_jax.training import base_config
from surm_jax.training.config import ADAPTER


class Task(NamedTuple):
    """The settings of one task for methods that train few parameters.

    Attributes:
        epochs: The number of passes over the training set.
        learning_rate: The peak learning rate.
        source: The place where these settings come from.
    """

    epochs: float
    learning_rate: float
    source: str


PAPER = "the authors' script, for its adapter: https://github.com/arijitthegame/structured-matrices-PEFT"
# Methods that train few parameters make many passes over the training set, but fewer passes over large data sets. The
# learning rate of all tasks is the authors' learning rate for RTE.
OURS = "ours, not tuned at this length"

TASKS = {
    "cola": Task(epochs=30, learning_rate=2e-3, source=OURS),
    "sst2": Task(epochs=10, learning_rate=2e-3, source=OURS),
    "mrpc": Task(epochs=30, learning_rate=2e-3, source=OURS),
    "qqp": Task(epochs=10, learning_rate=2e-3, source=OURS),
    "stsb": Task(epochs=30, learning_rate=2e-3, source=OURS),
    "mnli": Task(epochs=10, learning_rate=2e-3, source=OURS),
    "qnli": Task(epochs=10, learning_rate=2e-3, source=OURS),
    "rte": Task(epochs=80, learning_rate=2e-3, source=PAPER),
    "wnli": Task(epochs=30, learning_rate=2e-3, source=OURS),
}
# Methods that train the pretrained weights directly use a small learning rate and few epochs (arXiv 1810.04805,
# appendix A.3).
PRETRAINED = ("full", "attention_only")
PRETRAINED_RATE = 3e-5
PRETRAINED_EPOCHS = 3


def get_config(options: str = "") -> ml_collections.ConfigDict:
    """Return the configuration for a task and a method.

    Args:
        options: The text after the colon in `--config=configs/bert_glue.py:task=rte,method=lora`. The default values
            are `task=rte` and `method=circulant_adapter`.

    Raises:
        UserError: An option, a task or a method is unknown, or an option has no value.
    """
    chosen = {"task": "rte", "method": "circulant_adapter", **_parse(options)}
    require_one_of("task", chosen["task"], TASKS)
    require_one_of("method", chosen["method"], METHODS)
    task, method = TASKS[chosen["task"]], chosen["method"]

    config = base_config()
    config.model.variant = ""
    config.model.checkpoint = "hf://google-bert/bert-base-uncased"
    config.model.dropout = 0.1
    config.data.name = f"glue/{chosen['task']}"
    config.data.batch_size, config.data.eval_batch_size = 64, 64
    config.data.lengths = (16, 32, 64, 96, 128)
    config.peft.method = method
    # Dropout on the input of the adapter. Some methods do not have this setting.
    if "dropout" in config.peft[method]:
        config.peft[method].dropout = 0.15
    config.optim.epochs = PRETRAINED_EPOCHS if method in PRETRAINED else task.epochs
    config.optim.learning_rate[method] = PRETRAINED_RATE if method in PRETRAINED else task.learning_rate
    config.optim.warmup_ratio = 0.06
    config.optim.decay = "linear"
    config.optim.clip_norm = 0.0
    # Weight decay applies only to the groups adapter, head and rest. These patterns move the biases to the group bias,
    # together with the magnitudes of DoRA and the learned scales alpha. Norms have a group of their own.
    groups = config.optim.groups
    groups.adapter.pattern = ADAPTER + r"(?!.*(bias|magnitude|alpha)$).*"
    groups.head.pattern = r"head/kernel"
    groups.bias.pattern = r"(.*/)?(\w*bias|magnitude|alpha)"
    for group in (groups.adapter, groups.head, groups.rest):
        group.weight_decay = 0.01 if method in PRETRAINED else 0.25
    return config


def _parse(options: str) -> dict[str, str]:
    pairs = [option.partition("=") for option in options.split(",") if option]
    for name, _, value in pairs:
        require_one_of("the option", name, ("task", "method"))
        if not value:
            raise UserError(f"{name} has no value: write {name}=...")
    return {name: value for name, _, value in pairs}
