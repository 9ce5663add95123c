"""Open data sets that TensorFlow Datasets has prepared, without TensorFlow and without the network.

The folder that `tfds build` wrote is opened directly (`builder_from_directory`), because a builder that is found by
name would run the code that prepares the data set, which may try to download it.
"""

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from surm_jax.errors import UserError, did_you_mean

_NAME = re.compile(r"(?P<name>\w+(/[\w.+-]+)?)(:(?P<version>\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


class Records(Protocol):
    """The interface of the record sequences of tensorflow_datasets, which can be read in any order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the records at several indices, which is faster than reading them one by one."""


@dataclass(frozen=True)
class PreparedSet:
    """One version of a prepared data set, which `open_prepared` returns.

    Attributes:
        name: The name that was passed to `open_prepared`.
        version: The version that was found, such as "3.0.2".
        features: The feature objects of tensorflow_datasets, such as `tfds.features.Image`, by the name of the feature.
        splits: The names of the splits.
        data_dir: The folder of prepared data sets in which this one was found.
    """

    name: str
    version: str
    features: Mapping[str, Any]
    splits: tuple[str, ...]
    data_dir: Path
    _builder: Any

    @property
    def full_name(self) -> str:
        """The name of the data set with the version that was found, such as "cifar10:3.0.2"."""
        return f"{self.name.partition(':')[0]}:{self.version}"

    def files(self, splits: Iterable[str]) -> tuple[Path, ...]:
        """Return the files of some splits, and the files that describe the data set, such as `features.json`."""
        records = [Path(path) for split in splits for path in self._builder.info.splits[split].filepaths]
        folder = Path(self._builder.data_path)
        return (*records, *sorted(path for path in folder.iterdir() if path.suffix in (".json", ".txt")))

    def records(self, split: str, decoders: Mapping[str, Any] | None = None) -> Records:
        """Return the records of a split, for random access.

        If a file is damaged, a RuntimeError is raised when one of its records is read.

        Args:
            split: The name of the split, one of `splits`.
            decoders: Decoders of tensorflow_datasets that replace the default ones, by the name of the feature.

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
    """Open a data set that TensorFlow Datasets has prepared.

    This takes milliseconds, after the import of tensorflow_datasets, which takes half a second.

    Args:
        name: The name of the data set, such as `cifar10`, `cifar10:3.0.2`, `name/config` or `name/config:version`.
            Without a version, the newest prepared one is opened.
        data_dir: The folder of prepared data sets. `None` means `$TFDS_DATA_DIR`, or `~/tensorflow_datasets` if this
            variable is not set.
        others: The names of data sets from other sources. The error message for an unknown name lists them too.

    Raises:
        UserError: The name is unknown, the data set is not prepared in `data_dir`, its description is damaged, or its
            files do not allow random access. Nothing is ever downloaded; the message says how to prepare the data set.
    """
    folder = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    set_folder = _find(name, folder, others)
    import tensorflow_datasets as tfds  # Other data sets do not need this import.

    try:
        builder = tfds.builder_from_directory(set_folder)
    except Exception as error:
        # A damaged description raises errors of Protobuf, json or tfds, which have no other common base class.
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
    """Return the folder with one version of a data set. Without a requested version, it is the newest.

    Raises:
        UserError: The name is unknown, or the data set or this version of it is not prepared. The message says which.
    """
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

    # Community data sets are left out, because `list_builders` would download their list. It lists GLUE only if
    # TensorFlow is installed, so GLUE is added here.
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
    """Return the versions of all prepared data sets in a folder, oldest first, by the name of the data set.

    The name includes the configuration, as in `name/config`, if the data set has configurations.
    """
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
