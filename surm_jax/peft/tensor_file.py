"""The tensors of an adapter folder, which anybody may have written."""

from pathlib import Path

import numpy as np
import safetensors

from surm_jax.errors import UserError, did_you_mean
from surm_jax.files import is_finite, require_file

_DTYPES = ("F64", "F32", "F16", "BF16")
_MOST_TENSORS = 100_000


class TensorFile:
    """A safetensors file, of which each tensor is read once, after a look at its shape.

    Attributes:
        path: the file, for messages.
        left: names of the tensors that were not taken yet.
    """

    def __init__(self, path: Path) -> None:
        """Opens a file.

        Raises:
            UserError: if it cannot be read, is damaged, or holds more tensors than any adapter.
        """
        self.path = path
        require_file(path)
        try:
            # Not mapped: a mapped file that is cut off while it is read ends the process.
            self._file = safetensors.safe_open(path, framework="numpy", backend="pread")
            self.left = set(self._file.keys())
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} is damaged: {error}") from None
        if len(self.left) > _MOST_TENSORS:
            raise UserError(f"{path} holds {len(self.left):,} tensors: not those of an adapter")

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns a tensor, which must have this shape.

        Raises:
            UserError: if there is none, or it is another one, or it holds NaN or infinity.
        """
        if name not in self.left:
            raise UserError(f"{self.path} lacks {name!r}{did_you_mean(name, self.left)}")
        tensor = self._file.get_slice(name)
        if (found := tuple(tensor.get_shape())) != shape:
            raise UserError(f"{name} has the shape {found} in {self.path}, but the model needs {shape}")
        if tensor.get_dtype() not in _DTYPES:
            raise UserError(f"{name} in {self.path} is of type {tensor.get_dtype()}, not of {', '.join(_DTYPES)}")
        self.left.remove(name)
        try:
            array = self._file.get_tensor(name)
        except Exception as error:  # the file may change, and NumPy has limits of its own
            raise UserError(f"{self.path} is damaged: {error}") from None
        if not is_finite(array):
            raise UserError(f"{name} in {self.path} holds numbers that are not finite")
        return array
