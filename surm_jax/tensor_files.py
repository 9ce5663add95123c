"""Reading and writing of safetensors files, which hold named arrays.

The arrays are read one at a time, from a single file (`TensorFile`) or from several files (`ShardedTensors`). Large
checkpoints are split into several files, called shards, and a JSON file, called the index, tells which shard holds
which array. All these files are untrusted. An index is refused if it names a shard outside its folder, or if it does
not list exactly the arrays in the shards.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import safetensors
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from surm_jax.errors import UserError, did_you_mean
from surm_jax.files import is_finite, read_json, require_file

SUFFIX = ".safetensors"
_PREAD: dict[str, Any] = {} if safetensors.__version__.startswith("0.7.") else {"backend": "pread"}
_FLOATS = ("F64", "F32", "F16", "BF16")


class TensorFile:
    """An open safetensors file. Use it in a `with` statement.

    Arrays are read by the system call `pread`. The file is not mapped into memory (mmap), for two reasons. The pages of
    a mapped file would count as memory of the process, in addition to the arrays that are copied from them. And if
    another process truncated a mapped file while it is read, the operating system would kill this process. Versions of
    safetensors before 0.8 can only map files.

    Attributes:
        path: The path of the file. Error messages name it.
        keys: The names of the arrays, in the order in which they are stored in the file.
        header: The metadata of the file, which maps strings to strings.
        left: The names of the arrays that `take` has not returned yet.
    """

    def __init__(self, path: Path) -> None:
        """Open the file at `path`.

        Raises:
            UserError: The file cannot be read or is damaged.
        """
        self.path = path
        require_file(path)
        with self._damage():
            self._file = safe_open(path, framework="numpy", **_PREAD)
            self.keys: Sequence[str] = tuple(self._file.offset_keys())
            self.header: Mapping[str, str] = self._file.metadata() or {}
        self.left = set(self.keys)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def read(self, key: str) -> np.ndarray:
        """Return the array with the name `key`, as a copy that does not depend on the file.

        Raises:
            UserError: The file is damaged, or NumPy does not support the dtype or shape of the array.
        """
        with self._damage():
            return self._file.get_tensor(key)

    def take(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return the array with the name `key` after checking it, and remove the name from `left`.

        The array must have the given shape, be floating point, and contain only finite values. Shape and dtype are
        checked before the array is read.

        Raises:
            UserError: There is no array of this name, `take` has already returned it, the array has another shape, is
                not floating point, or contains NaN or infinity, or the file is damaged.
        """
        if key not in self.left:
            raise UserError(f"{self.path} lacks {key!r}{did_you_mean(key, self.left)}")
        tensor = self._file.get_slice(key)
        if (found := tuple(tensor.get_shape())) != shape:
            raise UserError(f"{key} has the shape {found} in {self.path}, but the model needs {shape}")
        if tensor.get_dtype() not in _FLOATS:
            raise UserError(f"{key} in {self.path} is of type {tensor.get_dtype()}, not of {', '.join(_FLOATS)}")
        array = self.read(key)
        if not is_finite(array):
            raise UserError(f"{key} in {self.path} holds numbers that are not finite")
        self.left.remove(key)
        return array

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """Turn exceptions of the safetensors library within the `with` block into `UserError`s that name the file."""
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from None
        except Exception as error:  # SafetensorError, NumPy's errors for shapes, AttributeError for unknown dtypes
            hint = "it may be incomplete, fetch or write it again"
            raise UserError(f"{self.path} is damaged: {error} ({hint})") from error


class ShardedTensors:
    """The open safetensors files (shards) of one checkpoint, read as if they were one file.

    The index of the checkpoint, `model.safetensors.index.json`, lists the shards. Use an instance in a `with`
    statement.

    Attributes:
        keys: The names of all arrays. The shards are in alphabetical order of their file names. The arrays of one shard
            are in the order in which it stores them.
    """

    def __init__(self, index: Path) -> None:
        """Open all shards that the index lists.

        Raises:
            UserError: The index is damaged (see `shards_of`), a shard is missing or damaged, or a shard does not hold
                exactly the arrays that the index lists for it.
        """
        self._shard_of = shards_of(index)
        self._files: dict[str, TensorFile] = {}
        self.keys: Sequence[str] = ()
        with ExitStack() as stack:
            for name in sorted(set(self._shard_of.values())):
                if not (index.parent / name).is_file():
                    raise UserError(f"{index} lists the shard {name!r}, which is not in {index.parent}: fetch it too")
                file = stack.enter_context(TensorFile(index.parent / name))
                self._require_promised(index, name, file.keys)
                self._files[name] = file
                self.keys = (*self.keys, *file.keys)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, key: str) -> np.ndarray:
        """Return the array with the name `key`, as a copy that does not depend on the file.

        Raises:
            UserError: The shard of the array is damaged, or NumPy does not support the dtype or shape of the array.
        """
        return self._files[self._shard_of[key]].read(key)

    def _require_promised(self, index: Path, name: str, keys: Sequence[str]) -> None:
        """Check that a shard holds exactly the arrays that the index lists for it.

        Args:
            index: Path of the index, for messages.
            name: File name of the shard.
            keys: Names of the arrays in the shard.

        Raises:
            UserError: The shard lacks an array, or holds an array that the index does not list for it.
        """
        promised = {key for key, shard in self._shard_of.items() if shard == name}
        if absent := sorted(promised - {*keys}):
            raise UserError(
                f"{index} says that {name!r} holds {absent[0]!r}, which it does not"
                f"{did_you_mean(absent[0], keys)}{_more(absent)}"
            )
        if extra := sorted({*keys} - promised):
            where = f"puts into {self._shard_of[extra[0]]!r}" if extra[0] in self._shard_of else "does not list"
            raise UserError(f"{name!r} holds {extra[0]!r}, which {index} {where}{_more(extra)}")


def shards_of(index: Path) -> dict[str, str]:
    """Read the index of a sharded checkpoint, and return the file name of the shard for every array name.

    Raises:
        UserError: The index cannot be read, is damaged, lists an array twice, or lists a shard that is not a
            `.safetensors` file in the same folder.
    """
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of or not all(isinstance(name, str) for name in shard_of.values()):
        raise UserError(f"{index} is damaged: its 'weight_map' must give every array the name of a file")
    for name in shard_of.values():
        if name != Path(name).name or "\\" in name or not name.endswith(SUFFIX):
            raise UserError(f"{index} lists the shard {name!r}: a shard must be a {SUFFIX} file in the same folder")
    return shard_of


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], header: Mapping[str, str]) -> None:
    """Write named arrays to a safetensors file.

    Arrays in C order (row-major) are written without a copy in memory. All other arrays are copied first.

    Args:
        path: The file. It gets the default permissions of new files.
        tensors: The arrays by name.
        header: The metadata of the file.

    Raises:
        OSError: The file cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: np.asarray(array, order="C") for name, array in tensors.items()}, path, metadata=dict(header))
    except SafetensorError as error:
        raise OSError(str(error)) from error
    # The safetensors library makes files that only their owner can read. Restore the default permissions.
    path.chmod(mode)


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
