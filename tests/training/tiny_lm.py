"""A tiny job for tests that fine-tunes a decoder with random weights on prompts with completions."""

import json
from pathlib import Path
from typing import Any

from flax import nnx

from surm_jax.models.decoder import Decoder
from surm_jax.models.decoder_config import DecoderConfig
from surm_jax.pretrained import save_huggingface
from surm_jax.training.config import RunConfig
from surm_jax.training.parsing import base_config, parse
from tests.data.lm.chats import write_tokenizer

GEOMETRY = {
    "vocab_size": 400, "width": 24, "depth": 2, "heads": 4, "kv_heads": 2, "head_width": 6, "mlp_width": 40,
    "max_positions": 64, "end_tokens": (2,),
}  # fmt: skip
COLOURS = ("red", "blue", "green")


def write_files(folder: Path, **geometry: Any) -> Path:
    """Write a decoder with its tokenizer to `folder/model` and lines to `folder/lines.jsonl`. Return the folder.

    The completions have unequal lengths.
    """
    model = Decoder(DecoderConfig(**{**GEOMETRY, **geometry}), rngs=nnx.Rngs(3))
    save_huggingface(folder / "model", model)
    write_tokenizer(folder / "model")
    lines = [
        {"prompt": f"{number} is", "completion": " " + " ".join([COLOURS[number % 3]] * (1 + number % 5))}
        for number in range(40)
    ]
    write_lines(folder / "lines.jsonl", lines)
    return folder


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_config(files: Path, method: str = "lora", **overrides: Any) -> RunConfig:
    """Return the configuration of the job. `overrides` are values by dotted key."""
    config = base_config()
    values = {
        "model.variant": "",
        "model.checkpoint": str(files / "model"),
        "data.name": str(files / "lines.jsonl"),
        "data.lengths": (16, 32),
        "data.holdout": 6,
        "data.batch_size": 8,
        "data.eval_batch_size": 8,
        "peft.train": (),
        "optim.steps": 4,
        "peft.method": method,
    }
    config.update_from_flattened_dict({**values, **overrides})
    return parse(config)
