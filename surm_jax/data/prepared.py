"""Prepared folders of TensorFlow Datasets, opened without TensorFlow and without the network.

The folder that `tfds build` wrote is opened directly (`builder_from_directory`): asking for a builder by name would run
the set's own preparation code, which may look for a download.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surm_jax.data.images.array_sets import EMBEDDED
from surm_jax.errors import UserError, did_you_mean

_NAME = re.compile(r"(?P<name>\w+(/[\w.+-]+)?)(:(?P<version>\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


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

    def records(self, split: str, decoders: Mapping[str, Any] | None = None) -> Sequence[dict[str, Any]]:
        """Opens a split for random access; a damaged file shows as a RuntimeError when it is read.

        Args:
            split: One of `splits`.
            decoders: By feature, what tensorflow_datasets shall decode otherwise than it does.

        Raises:
            UserError: a file of the split is missing.
        """
        missing = [path for path in self._builder.info.splits[split].filepaths if not Path(path).is_file()]
        if missing:
            raise UserError(
                f"data set {self.name!r} is incomplete: {missing[0]} is missing. "
                + _how_to_prepare(self.name, self.data_dir)
            )
        return self._builder.as_data_source(split, decoders=decoders, file_format="array_record")


def open_prepared(name: str, data_dir: str | os.PathLike[str] | None = None) -> PreparedSet:
    """Opens a prepared set; takes milliseconds after the import of tensorflow_datasets (half a second).

    Args:
        name: `cifar10`, `cifar10:3.0.2`, `name/config` or `name/config:version`; without a version the newest.
        data_dir: The folder that holds prepared sets; `$TFDS_DATA_DIR`, or else `~/tensorflow_datasets`, if None.

    Raises:
        UserError: the name is unknown, the set is not prepared in `data_dir` (the message says how to prepare it;
            nothing is ever downloaded), its description is damaged, or its files allow no random access.
    """
    folder = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    set_folder = _find(name, folder)
    import tensorflow_datasets as tfds  # Here, because other data sets need not pay for it.

    try:
        builder = tfds.builder_from_directory(set_folder)
    except Exception as error:
        # Whatever a damaged description trips over: protobuf, json and tfds have no error in common.
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


def _find(name: str, folder: Path) -> Path:
    """Returns the folder of one version of the set, or explains why there is none."""
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

    # Without the community sets, the list of which would be downloaded. GLUE is listed only where TensorFlow is.
    official = [*tfds.list_builders(with_community_datasets=False), "glue"]
    if not match or match["name"].split("/")[0] not in {*official, *(known.split("/")[0] for known in prepared)}:
        near = did_you_mean(match["name"] if match else name, dict.fromkeys([*EMBEDDED, *prepared, *official]))
        raise UserError(
            f"unknown data set {name!r}{near or '.'} Known are {', '.join(EMBEDDED)}, a path ending in .npz, and the "
            f"sets of TensorFlow Datasets prepared in a folder ({folder} was looked in: {holds})"
        )
    if not folder.is_dir():
        raise UserError(f"data set {name!r}: the data folder {folder} does not exist. " + _how_to_prepare(name, folder))
    raise UserError(
        f"data set {name!r} is not prepared in {folder} ({holds}{did_you_mean(match['name'], prepared)}). "
        + _how_to_prepare(name, folder)
    )


def _prepared(folder: Path) -> dict[str, list[str]]:
    """Returns {name or name/config: versions, oldest first} of the sets prepared below `folder`."""
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
