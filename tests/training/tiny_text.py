"""The smallest job on text, for tests: a BERT of one narrow block in a folder of transformers, and small GLUE tasks."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from flax import nnx

from surm_jax import data
from surm_jax.models import Bert, BertConfig
from surm_jax.pretrained import load, save_huggingface
from surm_jax.training.config import RunConfig
from surm_jax.training.parsing import base_config, parse
from tests.data.text.test_glue import example

WORDS = ("the", "a", "cat", "dog", "bird", "sleeps", "sings", "eats", "not", "and", "old", "small", "big", ".", "?")
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS)
# All sizes differ from each other and from the sizes of batches.
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
# Sentences have 3 or 8 words, so pairs 9, 14 or 19 tokens: no batch of pairs is without padding.
LENGTHS = (11, 20)
CLASSES = {
    "rte": ("entailment", "not_entailment"),
    "cola": ("unacceptable", "acceptable"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "stsb": (),
}
TESTS = {"mnli": ("validation_matched", "validation_mismatched")}


def write_files(folder: Path) -> Path:
    """Writes `bert`, the model with its tokeniser, and `tfds`, tasks of 40 examples to train on and 21 in each test."""
    write_bert(folder / "bert", BERT)
    for seed, task in enumerate(CLASSES):
        write_task(folder / "tfds", task, seed)
    return folder


def write_bert(folder: Path, config: BertConfig) -> None:
    """Writes a model as transformers does, no parameter of it at a value that hides a mistake."""
    (folder.parent / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (folder.parent / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    graphdef, state = nnx.split(load(lambda: Bert(config, rngs=nnx.Rngs(3)), None))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda array: array + 0.2 * rng.normal(size=array.shape).astype(np.float32), state)
    files = [folder.parent / name for name in ("vocab.txt", "tokenizer_config.json")]
    save_huggingface(folder, nnx.merge(graphdef, state), files=files)


def write_task(folder: Path, task: str, seed: int) -> None:
    """Writes a task as `tfds build` does: sentences of different lengths out of `WORDS`."""
    rng, classes = np.random.default_rng(seed), CLASSES[task]
    folder = folder / "glue" / task / "2.0.0"
    folder.mkdir(parents=True)
    columns = data.GLUE_TASKS[task].columns
    label = tfds.features.ClassLabel(names=classes) if classes else tfds.features.Scalar(np.float32)
    features = {**{column: tfds.features.Text() for column in columns}, "label": label, "idx": np.int32}
    (folder / "features.json").write_text(json.dumps(tfds.features.FeaturesDict(features).to_json()))
    label.save_metadata(folder, "label")
    described = []
    for split in ("train", *TESTS.get(task, ("validation",))):
        count = 40 if split == "train" else 21
        writer = array_record_module.ArrayRecordWriter(
            str(folder / f"glue-{split}.array_record-00000-of-00001"), "group_size:1"
        )
        for index in range(count):
            sentences = {column: " ".join(rng.choice(WORDS, rng.choice((3, 8), p=(0.75, 0.25)))) for column in columns}
            answer = int(rng.integers(len(classes))) if classes else float(rng.uniform(0, 5))
            writer.write(example({**sentences, "label": answer, "idx": index}))
        writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        described.append({"name": split, "numBytes": "1", "shardLengths": [str(count)], "filepathTemplate": template})
    info = {"name": "glue", "configName": task, "version": "2.0.0", "fileFormat": "array_record", "splits": described}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def flat_config(files: Path, task: str, **overrides: Any) -> dict[str, Any]:
    """The values of the tiny job's configuration by dotted key."""
    return {
        "model.variant": "",
        "model.checkpoint": str(files / "bert"),
        "data.dir": str(files / "tfds"),
        "data.name": f"glue/{task}",
        "data.lengths": LENGTHS,
        "data.batch_size": 16,
        "data.eval_batch_size": 8,
        "optim.steps": 4,
        # Runs on several devices are tested with images.
        "mesh.data": 1,
        **overrides,
    }


def make_config(files: Path, task: str = "rte", method: str = "circulant", **overrides: Any) -> RunConfig:
    config = base_config()
    config.update_from_flattened_dict(flat_config(files, task, **{"peft.method": method, **overrides}))
    return parse(config)


def logits_one_by_one(model: nnx.Module, folder: Path, sentences: list[tuple[str, ...]]) -> np.ndarray:
    """The logits of each example alone, without padding and without a mask."""
    tokens = data.load_tokenizer(folder).encode(data.TextSource(sentences, np.zeros(len(sentences), int)), 128)
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens, types: nnx.merge(graphdef, state)(tokens, token_types=types))
    places = [slice(*pair) for pair in itertools.pairwise(tokens.offsets)]
    return np.concatenate([forward(state, tokens.tokens[None, at], tokens.token_types[None, at]) for at in places])
