"""A tiny job for tests, with any method: a ViT with one narrow block on a few random images.

Other functions compare arrays, checkpoints and runs.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from orbax.checkpoint.experimental import v1 as ocp

from surm_jax.models import ViT, ViTConfig
from surm_jax.peft import Adapter
from surm_jax.pretrained import load, save_model
from surm_jax.training.config import RunConfig
from surm_jax.training.parsing import base_config, parse
from surm_jax.training.partition import Arrays, Partition, partition
from surm_jax.training.setup import Job, prepare

NAME = "tiny"
# Most sizes differ from each other and from the batch size 16, so that the shape of an array in a compiled program
# shows which array it is.
GEOMETRY = {"image_size": 8, "channels": 1, "patch_size": 4, "width": 10, "depth": 1, "heads": 2, "mlp_width": 14}
METHODS = ("circulant", "lora", "linear_probe", "full")


def write_files(folder: Path) -> Path:
    """Write the files of the tiny job into a folder, and return the folder.

    `data.npz` holds 40 training images and 21 test images of three classes. `weights.safetensors` holds the base model.
    """
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 40), ("test", 21)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 8, 8, 1), np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 3
    np.savez(folder / "data.npz", **arrays)
    vit = ViTConfig(**GEOMETRY, num_classes=3)
    save_model(folder / "weights.safetensors", load(None, lambda: ViT(vit, rngs=nnx.Rngs(5))))
    return folder


def flat_config(files: Path, **overrides: Any) -> dict[str, Any]:
    """Return the values of the tiny job's configuration that are not the default, by dotted key.

    Args:
        files: The folder that `write_files` has written.
        **overrides: Further values by dotted key.
    """
    return {
        "model.variant": NAME,
        "model.checkpoint": str(files / "weights.safetensors"),
        "data.name": str(files / "data.npz"),
        "data.augment": "affine",
        "data.batch_size": 16,
        "data.eval_batch_size": 8,
        "optim.steps": 4,
        **overrides,
    }


def make_config(files: Path, method: str = "circulant", **overrides: Any) -> RunConfig:
    config = base_config()
    config.update_from_flattened_dict(flat_config(files, **{"peft.method": method, **overrides}))
    return parse(config)


class Built(NamedTuple):
    job: Job
    model: nnx.Module
    adapter: Adapter
    partition: Partition
    trained: Arrays
    frozen: nnx.State


def build(config: RunConfig, seed: int = 0) -> Built:
    """Load, adapt and divide the model of a job, as a run does before its first step.

    The kernel of the head gets random values. If it were zero, as in a new head, the layers below it would get no
    gradient.
    """
    job = prepare(config, seed)
    model, adapter = job.adapt(job.base_model())
    kernel = model.head.kernel
    kernel[...] = 0.3 * jax.random.normal(jax.random.key(7), kernel.shape)
    # Copy the arrays from the job's mesh to the default device, because tests use meshes of their own.
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, jax.tree.map(lambda array: jnp.asarray(np.asarray(array)), state))
    return Built(job, model, adapter, *partition(model, adapter))


def batch_of(built: Built, size: int = 16) -> dict[str, np.ndarray]:
    """Return a batch of the first training examples, with pixels in [-1, 1] and labels."""
    source = built.job.task.dataset.train
    examples = [source[index] for index in range(size)]
    images = np.stack([example["image"] for example in examples]).astype(np.float32) / 127.5 - 1
    return {"image": images, "label": np.array([example["label"] for example in examples], np.int32)}


def logits_of(built: Built, images: np.ndarray) -> np.ndarray:
    graphdef, state = nnx.split(built.model)
    return np.asarray(jax.jit(lambda state, images: nnx.merge(graphdef, state)(images))(state, images))


def host(tree: Any) -> dict[str, np.ndarray]:
    """Copy all leaves of a pytree to NumPy arrays, by path. They stay valid when a leaf is donated."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.array(leaf, copy=True) for path, leaf in leaves}


def assert_equal_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    different = [
        name for name in one if one[name].dtype != other[name].dtype or one[name].tobytes() != other[name].tobytes()
    ]
    assert not different


def assert_close(one: dict[str, np.ndarray], other: dict[str, np.ndarray], tolerance: float) -> None:
    """Check that two dictionaries of arrays differ only by rounding errors.

    Each entry may differ by `tolerance` times the largest absolute entry of its array, or by `tolerance` if that entry
    is smaller than 1.
    """
    assert one.keys() == other.keys()
    for name, array in one.items():
        scale = max(1.0, np.abs(array).max())
        np.testing.assert_allclose(other[name], array, rtol=0, atol=tolerance * scale, err_msg=name)


def assert_near(exact: dict[str, np.ndarray], rounded: dict[str, np.ndarray], tolerance: float) -> None:
    """Check that the arrays in `rounded` are near those in `exact`.

    The norm of each difference may be at most `tolerance` times the norm of the exact array, so zeros must be zeros.
    """
    assert exact.keys() == rounded.keys()
    norms = {name: (np.linalg.norm(rounded[name] - array), np.linalg.norm(array)) for name, array in exact.items()}
    far = {name: (distance, norm) for name, (distance, norm) in norms.items() if not distance <= tolerance * norm}
    assert not far, far


def read_checkpoints(workdir: Path) -> dict[int, tuple[dict[str, np.ndarray], dict[str, Any]]]:
    """Return the arrays and the content of `checkpoint.json` for every checkpoint of a run, by step.

    They are read without `surm_jax.record`. Checksums and entries that depend on the time are left out.
    """
    found = {}
    for path in (workdir / "checkpoints").iterdir():
        record = json.loads((path / "checkpoint.json").read_text())
        for name in ("seconds", "files", "sha256"):
            del record[name]
        found[int(path.name)] = (host(ocp.load(path / "arrays")), record)
    return found


def assert_same_run(one: Path, other: Path) -> None:
    """Check that two runs have written the same metrics, checkpoints, adapter and result, bit for bit.

    Values that depend on the time, such as the speed, may differ.
    """
    lines, others = (
        [{**line, "examples_per_second": None} for line in _json_lines(folder / "metrics.jsonl")]
        for folder in (one, other)
    )
    assert lines == others
    checkpoints, other_checkpoints = read_checkpoints(one), read_checkpoints(other)
    # Compare the checkpoints that both runs have kept, at least the last one. An interrupted run has also saved others.
    assert max(checkpoints) == max(other_checkpoints)
    for step in checkpoints.keys() & other_checkpoints.keys():
        (leaves, record), (other_leaves, other_record) = checkpoints[step], other_checkpoints[step]
        assert_equal_bits(leaves, other_leaves)
        assert record == other_record
    files = sorted(path.name for path in (one / "adapter").iterdir())
    assert files == sorted(path.name for path in (other / "adapter").iterdir())
    for name in files:
        assert (one / "adapter" / name).read_bytes() == (other / "adapter" / name).read_bytes()
    clocks = {"seconds": None, "examples_per_second": None}
    result, other_result = (_json_lines(folder / "result.json", whole=True)[0] for folder in (one, other))
    assert {**result, **clocks} == {**other_result, **clocks}


def _json_lines(path: Path, whole: bool = False) -> list[dict[str, Any]]:
    text = path.read_text()
    return [json.loads(part) for part in ([text] if whole else text.splitlines())]
