"""Check that the installed libraries are not too old."""

import importlib.metadata
import re

OLDEST = {"jax": "0.10.0", "flax": "0.12.8", "optax": "0.2.8", "numpy": "2.0", "safetensors": "0.7.0"}
"""The oldest version of each library that `import surm_jax` needs, as in `requirements.txt`."""


def require_versions() -> None:
    """Check the versions of the libraries that `import surm_jax` needs, without importing them.

    Raises:
        ImportError: A library is older than in `OLDEST`. The message names both versions.
    """
    for name, oldest in OLDEST.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # The import of the library says that it is missing.
        if _numbers(installed) < _numbers(oldest):
            raise ImportError(
                f"surm_jax needs {name} {oldest} or newer, but {name} {installed} is installed:"
                f" pip install '{name}>={oldest}'"
            )


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers at the beginning of a version, without zeros at the end.

    >>> _numbers("0.10.0"), _numbers("2.1rc1") < _numbers("2.1.3")
    ((0, 10), True)
    """
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in found[0].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
