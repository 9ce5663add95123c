"""Write small data sets as `tfds build` prepares them, without TensorFlow."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module

Row = Mapping[str, bytes | str | int | float]

# The next functions encode a tf.train.Example. The field numbers are those in example.proto and feature.proto.


def field(number: int, payload: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(payload)) + payload


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def example(row: Row) -> bytes:
    entries = []
    for key, value in row.items():
        match value:
            case bytes() | str():
                feature = field(1, field(1, value if isinstance(value, bytes) else value.encode()))
            case int():
                feature = field(3, field(1, varint(value)))
            case float():
                feature = field(2, field(1, struct.pack("<f", value)))
        entries.append(field(1, field(1, key.encode()) + field(2, feature)))
    return field(1, b"".join(entries))


def write_set(
    root: Path,
    name: str,
    version: str,
    features: Mapping[str, Any],
    splits: Mapping[str, Sequence[Row]],
    file_format: str = "array_record",
) -> Path:
    """Write a data set, such as "cifar10" or "glue/rte", and return the folder of its version."""
    folder = root / name / version
    folder.mkdir(parents=True)
    base, _, config = name.partition("/")
    described = tfds.features.FeaturesDict(features)
    (folder / "features.json").write_text(json.dumps(described.to_json()))
    for key, feature in described.items():
        feature.save_metadata(folder, key)
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"name": base, "version": version, "fileFormat": file_format, **({"configName": config} if config else {})}
    info["splits"] = [
        {"name": split, "numBytes": "1", "shardLengths": [str(len(rows))], "filepathTemplate": template}
        for split, rows in splits.items()
    ]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for split, rows in splits.items():
        path = folder / f"{base}-{split}.array_record-00000-of-00001"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for row in rows:
            writer.write(example(row))
        writer.close()
    return folder
