"""Arrays by name out of safetensors files, one at a time: out of one file, or out of the shards that an index lists.

Files and index come from strangers: names that leave the folder, and an index that does not say exactly what the shards
hold, are refused.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from surm_jax.errors import UserError, did_you_mean
from surm_jax.files import read_json

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class TensorFile:
    """An open safetensors file, or several that stand for one.

    Attributes:
        keys: the names of the arrays, in the order in which the files hold them.
        read: returns the array of a name, in memory of its own.
        header: the text entries of the file; empty for shards.
    """

    keys: Sequence[str]
    read: Callable[[str], np.ndarray]
    header: Mapping[str, str]


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Opens one safetensors file.

    Arrays are read from the file (`pread`): pages of a mapped file would count as memory of the process beside the
    arrays that are made of them.

    Raises:
        UserError: now or on reading, if the file is missing or damaged.
    """
    with ExitStack() as stack:
        with _damage(path):
            file = stack.enter_context(safe_open(path, framework="numpy", backend="pread"))
            keys, header = file.offset_keys(), file.metadata() or {}

        def read(key: str) -> np.ndarray:
            with _damage(path):
                return file.get_tensor(key)

        yield TensorFile(keys, read, header)


@contextmanager
def open_shards(index: Path) -> Iterator[TensorFile]:
    """Opens the files that an index (`model.safetensors.index.json`) lists as if they were one.

    Raises:
        UserError: as `shards_of`; or a shard is missing or damaged, lacks an array that the index promises, or holds
            one that the index does not give it.
    """
    shard_of = shards_of(index)
    with ExitStack() as stack:
        readers, keys = {}, []
        for name in sorted(set(shard_of.values())):
            if not (index.parent / name).is_file():
                raise UserError(f"{index} lists the shard {name!r}, which is not in {index.parent}: fetch it too")
            file = stack.enter_context(open_tensors(index.parent / name))
            promised = {key for key, shard in shard_of.items() if shard == name}
            if absent := sorted(promised - {*file.keys}):
                raise UserError(
                    f"{index} says that {name!r} holds {absent[0]!r}, which it does not"
                    f"{did_you_mean(absent[0], file.keys)}{_more(absent)}"
                )
            if extra := sorted({*file.keys} - promised):
                where = f"puts into {shard_of[extra[0]]!r}" if extra[0] in shard_of else "does not list"
                raise UserError(f"{name!r} holds {extra[0]!r}, which {index} {where}{_more(extra)}")
            readers[name] = file.read
            keys += file.keys
        yield TensorFile(keys, lambda key: readers[shard_of[key]](key), {})


def shards_of(index: Path) -> dict[str, str]:
    """Returns the file name of the shard of every array, as an index has it.

    Raises:
        UserError: the index is damaged, names an array twice, or a shard is not a plain `.safetensors` file name.
    """
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of or not all(isinstance(name, str) for name in shard_of.values()):
        raise UserError(f"{index} is damaged: its 'weight_map' must give every array the name of a file")
    for name in shard_of.values():
        if name != Path(name).name or "\\" in name or not name.endswith(SUFFIX):
            raise UserError(f"{index} lists the shard {name!r}: a shard must be a {SUFFIX} file in the same folder")
    return shard_of


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], header: Mapping[str, str]) -> None:
    """Writes a safetensors file without a second copy of the arrays.

    Raises:
        OSError: the file cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: np.asarray(array, order="C") for name, array in tensors.items()}, path, metadata=dict(header))
    except SafetensorError as error:
        raise OSError(str(error)) from error
    # The library makes files that only their owner can read.
    path.chmod(mode)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turns what the library raises into an error that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint file {path}") from error
    except Exception as error:  # the library's own, NumPy's for shapes, AttributeError for types that NumPy has not
        raise UserError(
            f"{path} cannot be read as safetensors ({error}): it may be incomplete, fetch it again"
        ) from error


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
