"""A tiny job on text for tests: a BERT with one narrow block, and small versions of GLUE tasks with random sentences.

The BERT and its tokeniser are files in the format of the library transformers.
"""

import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from flax import nnx

from surm_jax import data
from surm_jax.models import Bert, BertConfig
from surm_jax.pretrained import load, save_huggingface
from surm_jax.training.config import RunConfig
from surm_jax.training.parsing import base_config, parse
from tests.data.prepared import write_set

WORDS = ("the", "a", "cat", "dog", "bird", "sleeps", "sings", "eats", "not", "and", "old", "small", "big", ".", "?")
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS)
# Most sizes differ from each other and from the batch sizes, so that the shape of an array shows which array it is.
BERT = BertConfig(
    vocab_size=len(VOCABULARY),
    width=32,
    depth=1,
    heads=2,
    mlp_width=48,
    max_positions=130,
    type_vocab_size=2,
    num_classes=5,
)
# Sentences have 3 or 8 words. With three special tokens, a pair of sentences has 9, 14 or 19 tokens. So every batch of
# pairs has padding.
LENGTHS = (11, 20)
CLASSES = {
    "rte": ("entailment", "not_entailment"),
    "cola": ("unacceptable", "acceptable"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "stsb": (),
}
TESTS = {"mnli": ("validation_matched", "validation_mismatched")}


def write_files(folder: Path) -> Path:
    """Write the files of the tiny job into a folder, and return the folder.

    The subfolder `bert` holds the model and its tokeniser. The subfolder `tfds` holds the tasks, each with 40 training
    examples and 21 examples in each test split.
    """
    write_bert(folder / "bert", BERT)
    for seed, task in enumerate(CLASSES):
        write_task(folder / "tfds", task, seed)
    return folder


def write_bert(folder: Path, config: BertConfig) -> None:
    """Write a model with random parameters and a tokeniser into a folder, in the format of the library transformers.

    Random numbers are added to all parameters, because initial values such as zeros could hide mistakes.
    """
    (folder.parent / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (folder.parent / "tokenizer_config.json").write_text('{"do_lower_case": true, "tokenizer_class": "BertTokenizer"}')
    graphdef, state = nnx.split(load(None, lambda: Bert(config, rngs=nnx.Rngs(3))))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda array: array + 0.2 * rng.normal(size=array.shape).astype(np.float32), state)
    files = [folder.parent / name for name in ("vocab.txt", "tokenizer_config.json")]
    save_huggingface(folder, nnx.merge(graphdef, state), files=files)


def write_task(folder: Path, task: str, seed: int) -> None:
    """Write a GLUE task with random sentences of words from `WORDS`, in the format that `tfds build` writes."""
    rng, classes = np.random.default_rng(seed), CLASSES[task]
    columns = data.GLUE_TASKS[task].columns
    label = tfds.features.ClassLabel(names=classes) if classes else tfds.features.Scalar(np.float32)
    features = {**{column: tfds.features.Text() for column in columns}, "label": label, "idx": np.int32}

    def row(index: int) -> dict[str, Any]:
        sentences = {column: " ".join(rng.choice(WORDS, rng.choice((3, 8), p=(0.75, 0.25)))) for column in columns}
        answer = int(rng.integers(len(classes))) if classes else float(rng.uniform(0, 5))
        return {**sentences, "label": answer, "idx": index}

    sizes = {"train": 40, **dict.fromkeys(TESTS.get(task, ("validation",)), 21)}
    splits = {split: [row(index) for index in range(size)] for split, size in sizes.items()}
    write_set(folder, f"glue/{task}", "2.0.0", features, splits)


def flat_config(files: Path, task: str, **overrides: Any) -> dict[str, Any]:
    """Return the values of the tiny job's configuration that are not the default, by dotted key.

    Args:
        files: The folder that `write_files` has written.
        task: The GLUE task, such as "rte".
        **overrides: Further values by dotted key.
    """
    return {
        "model.variant": "",
        "model.checkpoint": str(files / "bert"),
        "data.dir": str(files / "tfds"),
        "data.name": f"glue/{task}",
        "data.lengths": LENGTHS,
        "data.batch_size": 16,
        "data.eval_batch_size": 8,
        "optim.steps": 4,
        # Use one device. Runs on several devices are tested with images.
        "mesh.data": 1,
        **overrides,
    }


def make_config(files: Path, task: str = "rte", method: str = "circulant", **overrides: Any) -> RunConfig:
    config = base_config()
    config.update_from_flattened_dict(flat_config(files, task, **{"peft.method": method, **overrides}))
    return parse(config)


def logits_one_by_one(model: nnx.Module, folder: Path, sentences: list[tuple[str, ...]]) -> np.ndarray:
    """Run the model on each sentence separately, without padding and without a mask, and return the logits."""
    tokens = data.load_tokenizer(folder).encode(data.TextSource(sentences, np.zeros(len(sentences), int)), 128)
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens, types: nnx.merge(graphdef, state)(tokens, token_types=types))
    places = [slice(*pair) for pair in itertools.pairwise(tokens.offsets)]
    return np.concatenate([forward(state, tokens.tokens[None, at], tokens.token_types[None, at]) for at in places])
