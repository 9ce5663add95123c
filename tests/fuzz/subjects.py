"""The kinds of files and folders that the fuzz tests damage and read, which users may get from others."""

import functools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from surm_jax import data
from surm_jax.models import Bert, BertConfig, Decoder, DecoderConfig, ViT, ViTConfig
from surm_jax.peft import (
    C3A,
    BottleneckBranch,
    CirculantUpdate,
    LoKr,
    LoRA,
    Rule,
    StructuredUpdate,
    adapt,
    load_adapter,
    load_peft,
    save_adapter,
    save_peft,
)
from surm_jax.pretrained import from_pretrained, save_huggingface, save_model
from tests.peft.hf import hf_model
from tests.peft.models import MLP_TARGET, base, materialize, perturb

Content = dict[str, np.ndarray]


class Subject(NamedTuple):
    """A kind of file or folder to damage.

    Attributes:
        write: A function that writes undamaged files of this kind into an empty folder.
        read: A function that reads the folder with a public function of surm_jax, and returns arrays by name.
    """

    write: Callable[[Path], None]
    read: Callable[[Path], Content]


def _arrays(model: nnx.Module) -> Content:
    return {"/".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


VIT = {"image_size": 8, "patch_size": 4, "width": 6, "depth": 1, "heads": 2, "mlp_width": 10, "num_classes": 3}
BERT = {"vocab_size": 7, "width": 6, "depth": 1, "heads": 2, "mlp_width": 10, "max_positions": 9, "type_vocab_size": 2}


DECODER = {"vocab_size": 7, "width": 6, "depth": 2, "heads": 2, "kv_heads": 1, "head_width": 4, "mlp_width": 10}
DECODER |= {"max_positions": 9, "layer_pattern": "GL", "window": 3, "family": "qwen3", "qk_norm": True}
DECODER |= {"rope_type": "llama3", "rope_factor": 2.0, "end_tokens": (1, 2)}


def _vit(**fields) -> ViT:
    return materialize(lambda: ViT(ViTConfig(**VIT, **fields), rngs=nnx.Rngs(0)))


def _ours(*rules: Rule) -> Subject:
    def write(folder: Path) -> None:
        model, adapter = adapt(base("mlp"), rules, train=["head/.*"], rngs=nnx.Rngs(1))
        save_adapter(folder, perturb(model, adapter), adapter)

    return Subject(write, lambda folder: _arrays(load_adapter(folder, base("mlp"))[0]))


@functools.cache
def _hf_base() -> nnx.Module:
    return hf_model.make()


def _peft(method) -> Subject:
    def write(folder: Path) -> None:
        model, adapter = hf_model.trained((r"blocks/\d+/up", method), train=["head/.*"])
        save_peft(folder, model, adapter, hf_model.NAMES)

    return Subject(write, lambda folder: _arrays(load_peft(folder, _hf_base(), hf_model.NAMES)[0]))


def _npz(save) -> Subject:
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(0, 256, (6, 4, 5, 3), dtype=np.uint8),
        "train_labels": np.array([0, 1, 2, 0, 1, 2]),
        "test_images": rng.uniform(-1, 1, (2, 4, 5, 3)).astype(np.float32),
        "test_labels": np.array([2, 0], np.uint8),
    }

    def read(folder: Path) -> Content:
        found = data.load(str(folder / "set.npz"))
        rows = {f"{split}/{i}": getattr(found, split)[i] for split in ("train", "test") for i in range(2)}
        return {f"{row}/{key}": np.asarray(value) for row, parts in rows.items() for key, value in parts.items()}

    return Subject(lambda folder: save(folder / "set.npz", **arrays), read)


def _write_named_classes(path: Path, **arrays: np.ndarray) -> None:
    np.savez(path, **arrays, classes=np.array(["ant", "bee", "cow"]))


def _augreg(save) -> Subject:
    config = {"variant": "Ti/16", **VIT, "pool": "token"}
    width, heads, mlp = VIT["width"], VIT["heads"], VIT["mlp_width"]
    block, attention = "Transformer/encoderblock_0/", "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/"
    shapes = {
        "cls": (1, 1, width),
        "embedding/kernel": (4, 4, 3, width),
        "embedding/bias": (width,),
        "Transformer/posembed_input/pos_embedding": (1, 5, width),
        **{f"{block}LayerNorm_{i}/{part}": (width,) for i in (0, 2) for part in ("scale", "bias")},
        **{f"{attention}{name}/kernel": (width, heads, width // heads) for name in ("query", "key", "value")},
        **{f"{attention}{name}/bias": (heads, width // heads) for name in ("query", "key", "value")},
        f"{attention}out/kernel": (heads, width // heads, width),
        f"{attention}out/bias": (width,),
        f"{block}MlpBlock_3/Dense_0/kernel": (width, mlp),
        f"{block}MlpBlock_3/Dense_0/bias": (mlp,),
        f"{block}MlpBlock_3/Dense_1/kernel": (mlp, width),
        f"{block}MlpBlock_3/Dense_1/bias": (width,),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        "head/kernel": (width, 3),
        "head/bias": (3,),
    }
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return Subject(
        lambda folder: save(folder / "vit.npz", **arrays),
        lambda folder: _arrays(from_pretrained(folder / "vit.npz", fresh=(), **config)),
    )


def _native() -> Subject:
    def write(folder: Path) -> None:
        model = _vit()
        save_model(folder / "vit.safetensors", model)
        _sort_header(folder / "vit.safetensors")

    return Subject(write, lambda folder: _arrays(from_pretrained(folder / "vit.safetensors")))


def _sort_header(path: Path) -> None:
    """Sort the header of a safetensors file, so that its bytes are always the same. The library's order is random."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode().ljust(size)
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])


def _huggingface(make: Callable[[], nnx.Module]) -> Subject:
    def write(folder: Path) -> None:
        model = make()
        save_huggingface(folder, model)

    return Subject(write, lambda folder: _arrays(from_pretrained(folder)))


def _shards() -> Subject:
    def write(folder: Path) -> None:
        model = _vit(activation="gelu")
        save_huggingface(folder, model)
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        shard_of = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
        for shard in {*shard_of.values()}:
            save_file({name: tensors[name] for name in names if shard_of[name] == shard}, folder / shard)
        index = {"metadata": {"total_size": 1}, "weight_map": shard_of}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return Subject(write, lambda folder: _arrays(from_pretrained(folder)))


def _tokenizer() -> Subject:
    sentences = data.TextSource([("It rains.",), ("",)], np.arange(2))

    def write(folder: Path) -> None:
        (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nit\nrain\n##s\npour\n.\n")
        (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "strip_accents": None}))
        (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "it", "lstrip": True}}))
        (folder / "added_tokens.json").write_text(json.dumps({"<new>": 9}))
        if folder.name.startswith("tokenizer_json"):
            data.load_tokenizer(folder)._library.save(str(folder / "tokenizer.json"))

    def read(folder: Path) -> Content:
        return {"tokens": data.load_tokenizer(folder).encode(sentences, 16).tokens}

    return Subject(write, read)


SUBJECTS: dict[str, Subject] = {
    "ours_circulant": _ours(Rule(MLP_TARGET, CirculantUpdate())),
    "ours_several": _ours(
        Rule("blocks/0", LoRA(rank=3)),
        Rule("blocks/1", StructuredUpdate(family="Circulant + LowRank"), parts=2, which=(0,)),
        Rule("tail/gate", BottleneckBranch(waist=2)),
    ),
    "peft_lora": _peft(LoRA(rank=2)),
    "peft_lokr": _peft(LoKr()),
    "peft_c3a": _peft(C3A()),
    "set_stored": _npz(np.savez),
    "set_packed": _npz(np.savez_compressed),
    "set_named": _npz(_write_named_classes),
    "augreg_stored": _augreg(np.savez),
    "augreg_packed": _augreg(np.savez_compressed),
    "native": _native(),
    "hf_vit": _huggingface(lambda: _vit(activation="gelu")),
    "hf_bert": _huggingface(lambda: materialize(lambda: Bert(BertConfig(**BERT), rngs=nnx.Rngs(0)))),
    "hf_decoder": _huggingface(lambda: materialize(lambda: Decoder(DecoderConfig(**DECODER), rngs=nnx.Rngs(0)))),
    "hf_shards": _shards(),
    "tokenizer": _tokenizer(),
    "tokenizer_json": _tokenizer(),
}
