"""Image classification sets in the layout of TensorFlow Datasets, read without TensorFlow and without the network.

The folder that `tfds build` wrote is opened directly (`builder_from_directory`): asking for a builder by name would run
the set's own preparation code, which may look for a download. Images are decoded here, by Pillow, so that pixels do not
depend on whether OpenCV happens to be installed.
"""

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from surm_jax.data.array_sets import EMBEDDED
from surm_jax.data.dataset import ImageDataset
from surm_jax.errors import UserError, did_you_mean

_NAME = re.compile(r"(?P<name>\w+(/[\w.+-]+)?)(:(?P<version>\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class TfdsSource:
    """An `ImageSource` over the encoded records of one split.

    Attributes:
        records: Random-access records with the encoded bytes under "image" and a number under "label".
        channels: Channels to decode to: 1, 3 or 4.
        num_classes: Labels must be below it.
        name: What error messages call this split.

    Raises:
        UserError: (when read) a record cannot be decoded, or has no label; the message names it.
    """

    records: Sequence[dict[str, Any]]
    channels: int
    num_classes: int
    name: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = self.records[index]
        except RuntimeError as error:  # From the C++ reader, which opens a file when it is first read.
            raise UserError(f"{self.name}: example {index} cannot be read, its file is damaged ({error})") from error
        label = int(record["label"])
        if not 0 <= label < self.num_classes:
            raise UserError(f"{self.name}: example {index} has label {label}, outside 0 to {self.num_classes - 1}")
        try:
            image = np.asarray(Image.open(io.BytesIO(record["image"])).convert(_MODES[self.channels]))
        except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG.
            raise UserError(f"{self.name}: the image of example {index} cannot be decoded ({error})") from error
        return {"image": image[..., None] if image.ndim == 2 else image, "label": label}


def load_tfds(name: str, data_dir: str | os.PathLike[str] | None = None) -> ImageDataset:
    """Opens a prepared TFDS set; takes milliseconds after the import of tensorflow_datasets (half a second).

    Args:
        name: `cifar10`, `cifar10:3.0.2`, `name/config` or `name/config:version`; without a version the newest.
        data_dir: The folder that holds prepared sets; `$TFDS_DATA_DIR`, or else `~/tensorflow_datasets`, if None.

    Raises:
        UserError: the name is unknown, the set is not prepared in `data_dir` (the message says how to prepare it;
            nothing is ever downloaded), its files are missing or damaged, or it is no image classification set with
            train and test splits.
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
    available = builder.info.available_file_formats()
    if tfds.core.FileFormat.ARRAY_RECORD not in available:
        raise UserError(
            f"{set_folder} holds {', '.join(sorted(f.value for f in available))} files, which allow no random access. "
            + _how_to_prepare(name, folder)
        )
    image, label = _features(name, builder.info.features, tfds)
    channels = image.shape[-1] or 3
    sources = []
    for split in _splits(name, builder.info.splits):
        missing = [path for path in builder.info.splits[split].filepaths if not Path(path).is_file()]
        if missing:
            raise UserError(
                f"data set {name!r} is incomplete: {missing[0]} is missing. " + _how_to_prepare(name, folder)
            )
        records = builder.as_data_source(
            split, decoders={"image": tfds.decode.SkipDecoding()}, file_format=tfds.core.FileFormat.ARRAY_RECORD
        )
        sources.append(TfdsSource(records, channels, label.num_classes, f"{name}, split {split}"))
    return ImageDataset(name, *sources, tuple(label.names), (*image.shape[:2], channels))


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

    # Without the community sets, the list of which would be downloaded.
    official = tfds.list_builders(with_community_datasets=False)
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


def _features(name: str, features: Any, tfds: Any) -> tuple[Any, Any]:
    """Returns the image and the label feature."""
    image, label = (dict(features.items()).get(key) for key in ("image", "label"))
    if (
        not isinstance(image, tfds.features.Image)
        or not isinstance(label, tfds.features.ClassLabel)
        or image.np_dtype != np.uint8
        or (image.shape[-1] or 3) not in _MODES
    ):
        has = ", ".join(f"{key} ({type(value).__name__})" for key, value in features.items())
        raise UserError(
            f"data set {name!r} is no image classification set: it needs a uint8 'image' of 1, 3 or 4 channels and a "
            f"class 'label', but its features are {has}"
        )
    return image, label


def _splits(name: str, splits: Any) -> tuple[str, str]:
    """Returns the names of the training and the test split."""
    test = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or test is None:
        raise UserError(
            f"data set {name!r} has the splits {', '.join(splits)}; it needs 'train', and 'test' or 'validation'"
        )
    return "train", test
