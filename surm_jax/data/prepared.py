"""Prepared folders of TensorFlow Datasets, opened without TensorFlow and without the network.

The folder that `tfds build` wrote is opened directly (`builder_from_directory`). A builder that is looked up by name
would run the preparation code of the set, which may try to download it.
"""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from surm_jax.errors import UserError, did_you_mean

_NAME = re.compile(r"(?P<name>\w+(/[\w.+-]+)?)(:(?P<version>\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


class Records(Protocol):
    """Records with random access, as tensorflow_datasets opens them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return many records at once, which is faster than one by one."""


@dataclass(frozen=True)
class PreparedSet:
    """One version of a set, opened by `open_prepared`.

    Attributes:
        name: The name that was asked for.
        version: The version that was found, such as "3.0.2".
        features: The set's features by name, as tensorflow_datasets describes them.
        splits: Names of the splits.
        data_dir: The folder of prepared sets that it was found in.
    """

    name: str
    version: str
    features: Mapping[str, Any]
    splits: tuple[str, ...]
    data_dir: Path
    _builder: Any

    @property
    def full_name(self) -> str:
        """The name with the version."""
        return f"{self.name.partition(':')[0]}:{self.version}"

    def records(self, split: str, decoders: Mapping[str, Any] | None = None) -> Records:
        """Open a split for random access. A damaged file raises a RuntimeError when it is read.

        Args:
            split: One of `splits`.
            decoders: Decoders of tensorflow_datasets by feature, which replace the default ones.

        Raises:
            UserError: A file of the split is missing.
        """
        missing = [path for path in self._builder.info.splits[split].filepaths if not Path(path).is_file()]
        if missing:
            raise UserError(
                f"data set {self.name!r} is incomplete: {missing[0]} is missing. "
                + _how_to_prepare(self.name, self.data_dir)
            )
        return self._builder.as_data_source(split, decoders=decoders, file_format="array_record")


def open_prepared(
    name: str, data_dir: str | os.PathLike[str] | None = None, others: Collection[str] = ()
) -> PreparedSet:
    """Open a prepared set. This takes milliseconds after the import of tensorflow_datasets (half a second).

    Args:
        name: `cifar10`, `cifar10:3.0.2`, `name/config` or `name/config:version`; without a version the newest.
        data_dir: The folder of prepared sets; `None` means `$TFDS_DATA_DIR`, or else `~/tensorflow_datasets`.
        others: Names of sets from other sources, which the message about an unknown name also lists.

    Raises:
        UserError: The name is unknown, the set is not prepared in `data_dir` (the message says how to prepare it;
            nothing is ever downloaded), its description is damaged, or its files allow no random access.
    """
    folder = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    set_folder = _find(name, folder, others)
    import tensorflow_datasets as tfds  # Imported here: other data sets do not need it.

    try:
        builder = tfds.builder_from_directory(set_folder)
    except Exception as error:
        # Protobuf, json and tfds have no common class for the errors of a damaged description.
        raise UserError(
            f"{set_folder} is damaged: its dataset_info.json or features.json cannot be read ({error}). "
            + _how_to_prepare(name, folder)
        ) from error
    available = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in available:
        raise UserError(
            f"{set_folder} holds {', '.join(sorted(available))} files, which allow no random access. "
            + _how_to_prepare(name, folder)
        )
    features, splits = dict(builder.info.features.items()), tuple(builder.info.splits)
    return PreparedSet(name, set_folder.name, features, splits, folder, builder)


def _find(name: str, folder: Path, others: Collection[str]) -> Path:
    """Return the folder of one version of the set, or raise an error that says why there is none."""
    prepared = _prepared(folder)
    holds = (
        f"it holds {', '.join(f'{known}:{versions[-1]}' for known, versions in prepared.items()) or 'no prepared set'}"
    )
    match = _NAME.fullmatch(name)
    if match and match["name"] in prepared:
        base, version = match["name"], match["version"] or prepared[match["name"]][-1]
        if version not in prepared[base]:
            raise UserError(f"{folder} holds {base} in version {', '.join(prepared[base])}, not {version}")
        return folder / base / version
    import tensorflow_datasets as tfds

    # Community sets are left out, because their list would be downloaded. GLUE is listed only if TensorFlow is
    # installed.
    official = [*tfds.list_builders(with_community_datasets=False), "glue"]
    if not match or match["name"].split("/")[0] not in {*official, *(known.split("/")[0] for known in prepared)}:
        near = did_you_mean(match["name"] if match else name, dict.fromkeys([*others, *prepared, *official]))
        raise UserError(
            f"unknown data set {name!r}{near or '.'} Known are {', '.join([*others, ''])}a path ending in .npz, and "
            f"the sets of TensorFlow Datasets in the folder {folder} ({holds})"
        )
    if not folder.is_dir():
        raise UserError(f"data set {name!r}: the data folder {folder} does not exist. " + _how_to_prepare(name, folder))
    raise UserError(
        f"data set {name!r} is not prepared in {folder} ({holds}{did_you_mean(match['name'], prepared)}). "
        + _how_to_prepare(name, folder)
    )


def _prepared(folder: Path) -> dict[str, list[str]]:
    """Return the sets in a folder: their names, with the configuration if any, and their versions, oldest first."""
    prepared: dict[str, list[str]] = {}
    for pattern in ("*/*/dataset_info.json", "*/*/*/dataset_info.json"):
        for info in sorted(folder.glob(pattern)):
            *name, version = info.parent.relative_to(folder).parts
            if _VERSION.fullmatch(version):
                prepared.setdefault("/".join(name), []).append(version)
    for versions in prepared.values():
        versions.sort(key=lambda version: tuple(map(int, version.split("."))))
    return prepared


def _how_to_prepare(name: str, folder: Path) -> str:
    return (
        "Prepare it once, with TensorFlow: pip install '.[tfds]' && "
        f"tfds build {name} --file_format=array_record --data_dir={folder}"
    )
