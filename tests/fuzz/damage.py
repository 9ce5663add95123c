"""Functions that damage files at random, for the fuzz tests.

All of them take the generator of random numbers `rng` as an argument, so that a seed gives the same damage again.
"""

import hashlib
import io
import json
import random
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 64, 10**6, 10**9, 2**31, 2**63, 10**30, 10**400, 0.5, -1.5, 1e-300, 1e308,
    float("nan"), float("inf"), "", "x", "0", "a" * 20_000, "../../etc/passwd", "/etc/passwd", "..\\x", "a\x00b",
    "\ud800", "\x1b[2J", "ü" * 50, [], {}, [0], [None], [[0]], {"": {}}, {"a": 1}, list(range(3000)), "(a*)*b",
    "(.*)*x", "((.*)*)*x", ".*" * 20 + "x", "(a|a|.)" * 30, "a{1000000}", "(" * 2000, "[", ".*", ".*/.*", "head/.*",
    "circulant", "lora", "dora", "c3a", "lokr", "mora", "kronecker", "structured", "low_displacement", "compacter",
    "bottleneck", "adapter_drop", "circulant_adapter", "Circulant + LowRank", "Circulant+" * 3000 + "Circulant",
    "LORA", "C3A", "LOKR", "bert", "roberta", "vit", "clip", "dinov2", "F8_E4M3", "I64", "BF16", "C64", "gelu",
)  # fmt: skip

ODD_DESCRS = ("|O", "|V0", "<U0", "|S0", "<f8", "<f2", ">f4", "<i8", "|u1", "<c8", "<M8[s]", "<U4", "<f16", "x", (),
              [], [("a", "<f4")], ("<f4", (2,)), ("<f4", (10**9,)), None, "|b1", "|S7")  # fmt: skip


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return the content of a file after damaging it at a random place, whatever its format.

    It is cut off or made longer, some bits are flipped, or a block of bytes is overwritten, swapped, repeated or
    removed.
    """
    size = len(data)
    at, length = rng.randrange(size + 1), rng.choice((1, 2, 4, 8, 64, 512))
    block = bytearray(data)
    match rng.randrange(8):
        case 0:
            return data[:at]
        case 1:
            return data + rng.randbytes(length)
        case 2:
            for _ in range(rng.choice((1, 1, 2, 8, 50))):
                place = rng.randrange(min(size, rng.choice((64, 400, size)))) if size else 0
                block[place : place + 1] = bytes([(block[place] if size else 0) ^ (1 << rng.randrange(8))])
        case 3:
            block[at : at + length] = rng.randbytes(length)
        case 4:
            other = rng.randrange(size + 1)
            block[at : at + length], block[other : other + length] = (
                data[other : other + length],
                data[at : at + length],
            )
        case 5:
            block[at:at] = data[at : at + length]
        case 6:
            del block[at : at + length]
        case 7:
            block[at : at + length] = rng.choice((b"\0", b"\xff", b"[", b"9")) * length
    return bytes(block)


def damage_json(rng: random.Random, tree: Any) -> Any:
    """Replace, remove, rename, swap or wrap some values in a JSON value, and return it.

    Lists and dictionaries are changed in place.
    """
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            return rng.choice(ODD_VALUES)
        holder, key = rng.choice(places)
        match rng.randrange(7):
            case 0 | 1 | 2:
                holder[key] = rng.choice(ODD_VALUES)
            case 3:
                del holder[key]
            case 4 if isinstance(holder, dict):
                odd = rng.choice([value for value in ODD_VALUES if isinstance(value, str)])
                holder[rng.choice((odd, key + "x", key[:-1], key.replace("0", "1")))] = holder.pop(key)
            case 5:
                other, its_key = rng.choice(places)
                try:
                    holder[key], other[its_key] = other[its_key], holder[key]
                    json.dumps(tree)
                except (ValueError, RecursionError):  # One value contained the other, and now contains itself.
                    holder[key] = None
            case 6 if type(holder[key]) is int:
                holder[key] = rng.choice((holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 2**20, 2**62))
            case _:
                holder[key] = [holder[key]]
    return tree


def _places(tree: Any):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from _places(value)


def write_json(rng: random.Random, tree: Any) -> bytes:
    """Return a value as JSON text, sometimes with a key that occurs twice or with very deep nesting."""
    text = json.dumps(tree)
    match rng.randrange(12):
        case 0 if text.startswith('{"'):
            end = text.index('"', 2)
            text = f"{{{text[1 : end + 1]}: 1, {text[1:]}"
        case 1:
            text = text.replace("1", "[" * 20_000 + "]" * 20_000, 1)
        case 2:
            text = text.replace("{", '{"deep": ' + "[" * 400 + "]" * 400 + ", ", 1)
    return text.encode("utf-8", "surrogatepass")


def damage_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Return the content of a safetensors file with a damaged header, of the correct length.

    The header may hold a configuration that surm_jax has written. Then only that is damaged with probability 0.5.
    """
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    if "config" in (texts := header.get("__metadata__", {})) and rng.random() < 0.5:
        texts["config"] = write_json(rng, damage_json(rng, json.loads(texts["config"]))).decode("utf-8", "replace")
        text = json.dumps(header).encode()
    else:
        text = write_json(rng, damage_json(rng, header))
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def damage_npz(rng: random.Random, data: bytes) -> bytes:
    """Return the content of an .npz file in which an array, its header or the list of arrays is damaged."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = rng.randrange(len(members))
    name, content = members[at]
    match rng.randrange(6):
        case 0:
            del members[at]
        case 1:
            members[at] = (
                rng.choice((name[:-4], "../x.npy", "/etc/x.npy", name + "x", "a" * 5000, "", "ü.npy")),
                content,
            )
        case 2:
            members.append((rng.choice(members)[0], content))
        case 3:
            members[at] = (name, rng.choice((b"", b"raw", damage_bytes(rng, content), content[10:])))
        case _:
            array = np.lib.format.read_array(io.BytesIO(content))
            members[at] = (name, _odd_header(rng, array) + array.tobytes())
    file = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2))
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", method) as archive:
        warnings.simplefilter("ignore")  # zipfile warns if two files in the archive have the same name.
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()


def _odd_header(rng: random.Random, array: np.ndarray) -> bytes:
    shape, descr = array.shape, array.dtype.str
    if rng.random() < 0.6:
        odd = rng.choice((0, 1, -1, 2**31, 2**32, 10**12, 2**62, 2**63, 10**30, None, 1.5, "x", True))
        at = rng.randrange(len(shape) + 1)
        shape = rng.choice(
            ((*shape[:at], odd, *shape[at + 1 :]), (odd,), (odd, odd), (1,) * 70, (), [3], None, shape[::-1])
        )
    if rng.random() < 0.6:
        descr = rng.choice(ODD_DESCRS)
    header = {"descr": descr, "fortran_order": rng.choice((False, False, True, None, 3)), "shape": shape}
    if rng.random() < 0.1:
        header[rng.choice(("x", "shape", "descr"))] = rng.choice(ODD_VALUES[:12])
    text = (repr(header) + rng.choice(("\n", "", "L", "(" * 300, "\n\n")) + " " * rng.choice((0, 20, 20_000))).encode()
    return b"\x93NUMPY" + bytes([rng.choice((1, 1, 1, 2, 3, 9)), 0]) + struct.pack("<H", len(text) % 2**16) + text


def damage_folder(rng: random.Random, folder: Path) -> None:
    """Damage one or two files of a folder, in the way of their format or as plain bytes."""
    for _ in range(rng.choice((1, 1, 1, 2))):
        path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()) or [folder / "gone"])
        kind = rng.random()
        if not path.is_file() or kind < 0.03:
            _replace_file(rng, path)
        elif kind < 0.4 or path.suffix not in _BY_SUFFIX:
            path.write_bytes(damage_bytes(rng, path.read_bytes()))
        else:
            try:
                data = _BY_SUFFIX[path.suffix](rng, path.read_bytes())
            except Exception:  # The file was damaged before and no longer has its format.
                data = damage_bytes(rng, path.read_bytes())
            path.write_bytes(data)


def _replace_file(rng: random.Random, path: Path) -> None:
    path.unlink(missing_ok=True)
    match rng.randrange(4):
        case 0:
            path.mkdir(exist_ok=True)
        case 1:
            path.symlink_to(path.name)
        case 2:
            path.symlink_to("/dev/zero")


def sign(folder: Path) -> None:
    """Write the correct SHA-256 of a damaged adapter into its `adapter_config.json`.

    Without this, loading would stop at the wrong SHA-256 and never reach the damage. An attacker could do the same.
    """
    path, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not (path.is_file() and tensors.is_file()):
        return
    try:
        config = json.loads(path.read_bytes())
        rest = {key: value for key, value in config.items() if key != "sha256"}
        payload = tensors.read_bytes() + json.dumps(rest, sort_keys=True).encode()
        path.write_text(json.dumps({**config, "sha256": hashlib.sha256(payload).hexdigest()}))
    except (ValueError, AttributeError, RecursionError):
        pass  # The file is not JSON with an object any more, so that nothing can be written into it.


_BY_SUFFIX: dict[str, Callable[[random.Random, bytes], bytes]] = {
    ".json": lambda rng, data: write_json(rng, damage_json(rng, json.loads(data))),
    ".safetensors": damage_safetensors,
    ".npz": damage_npz,
}


def copy_damaged(rng: random.Random, whole: Path, target: Path) -> None:
    """Copy a folder and damage the copy. A damaged adapter of surm_jax gets a correct SHA-256 with probability 0.6.

    Args:
        rng: The generator of random numbers.
        whole: The undamaged folder. Its name begins with "ours" if it is an adapter of surm_jax.
        target: The folder for the damaged copy. It is replaced if it exists.
    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(whole, target)
    damage_folder(rng, target)
    if whole.name.startswith("ours") and rng.random() < 0.6:
        sign(target)
