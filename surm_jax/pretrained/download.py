"""Download files into a cache on the disk.

A file in the cache is always complete, and an interrupted download can be resumed.
"""

import base64
import hashlib
import http.client
import logging
import os
import string
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from urllib.parse import quote, urlsplit

from filelock import FileLock
from tqdm import tqdm

from surm_jax.errors import UserError
from surm_jax.files import cache_root

TIMEOUT_SECONDS = 10
CHUNK_BYTES = 1 << 20
_LONGEST_NAME = 255

log = logging.getLogger(__name__)


def cache_path(url: str) -> Path:
    """Return the path in the cache for the file at a URL, `<cache_root()>/<host>/<path>`.

    The host folder is named `<host>_<port>` if the URL has a port. If it has a query, the file lies in one more folder
    with the percent-encoded query as its name, or its SHA-256 if that is too long for a file name.

    Raises:
        UserError: The URL is malformed or does not end in a file name.

    >>> cache_path("https://example.org/vit/b16.npz").parts[-3:]
    ('example.org', 'vit', 'b16.npz')
    """
    try:
        split = urlsplit(url)
        port = split.port
    except ValueError as error:
        raise UserError(f"{url!r} is not a URL: {error}") from None
    folders = [part for part in split.path.split("/") if part]
    if not split.hostname or not folders or split.path.endswith("/") or {".", ".."} & {*folders}:
        raise UserError(f"the URL must name a host and a file, such as https://example.org/vit.npz, got {url!r}")
    if split.query:  # The same path with another query may be another file.
        query = quote(split.query, safe="")
        folders.insert(-1, query if len(query) <= _LONGEST_NAME else hashlib.sha256(query.encode()).hexdigest())
    host = f"{split.hostname}_{port}" if port else split.hostname
    return cache_root().joinpath(host, *folders)


def download(url: str) -> Path:
    """Download the file at a URL unless there is a local copy, and return the path of the copy.

    The file appears under its final name only when it is complete. If the connection breaks, the bytes received so far
    stay in a `.part` file next to it. The next call continues from there if the server still has the same version of
    the file, according to the ETag or the modification date. If the server announces an MD5 hash, as Google Cloud
    Storage does, it is compared. If several processes want the same file, one downloads it and the others wait. A
    terminal shows a progress bar.

    Raises:
        UserError: The file cannot be downloaded (the server does not answer within 10 seconds, it answers with an HTTP
            error, it sends fewer bytes than it announced, or the MD5 hash differs), or the file cannot be written. The
            message says to which path the user can copy the file instead.
    """
    target = cache_path(url)
    if target.is_file():
        return target
    partial = _Partial(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f"{target.name}.lock")):
            if not target.is_file():  # Another process may have downloaded it meanwhile.
                log.info("downloading %s to %s", url, target)
                _fetch(url, partial)
                os.replace(partial.path, target)
                partial.discard()
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        kept = f"{partial.size()} bytes of it are kept, call again to fetch the rest; or " if partial.size() else ""
        raise UserError(
            f"cannot download {url} ({reason}): {kept}download this file on another machine, and put it at {target}"
        ) from error
    return target


class _Partial:
    """A partly downloaded file, with a second file beside it that holds its version.

    The version is the header `ETag` or `Last-Modified` that the server sent when the download started.
    """

    def __init__(self, target: Path):
        self.path = target.with_name(f"{target.name}.part")
        self._version = target.with_name(f"{target.name}.part.version")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def version(self) -> str:
        return self._version.read_text() if self._version.is_file() else ""

    def start(self, version: str) -> None:
        """Replace the partial file by an empty one, and record the version of the file to download.

        This order matters: old bytes must never count as bytes of the new version.
        """
        self.discard()
        if version:
            self._version.write_text(version)
        self.path.touch()

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._version.unlink(missing_ok=True)


def _fetch(url: str, partial: _Partial) -> None:
    """Download the missing bytes of a partial file.

    If this fails, the partial file is kept only if the remaining bytes can be requested later.
    """
    try:
        start = partial.size()
        # Because of If-Range, the server sends the whole file if its version has changed since the first request.
        asked = {"Range": f"bytes={start}-", "If-Range": partial.version()} if start and partial.version() else {}
        request = urllib.request.Request(quote(url, safe=string.punctuation), headers=asked)
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            if not asked or error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            partial.discard()
            return _fetch(url, partial)
        with response:
            if response.status != http.client.PARTIAL_CONTENT:
                start = 0
                partial.start(_version(response.headers))
            elif not (response.headers.get("Content-Range") or "").startswith(f"bytes {start}-"):
                raise OSError(f"asked for bytes from {start}, got {response.headers.get('Content-Range')}")
            announced = response.headers.get("Content-Length")
            if announced and not announced.isdecimal():
                raise OSError(f"the server announces {announced!r} bytes")
            total = start + int(announced) if announced else None
            _append(response, partial.path, total)
        if total is not None and partial.size() != total:
            raise OSError(f"the connection ended after {partial.size()} of {total} bytes")
        _check_md5(partial, response.headers)
    except BaseException:
        if not (partial.size() and partial.version()):
            partial.discard()
        raise


def _append(response: http.client.HTTPResponse, path: Path, total: int | None) -> None:
    """Append the body of a response to a file. The progress bar ends at `total` bytes, the size of the whole file."""
    with (
        path.open("ab") as file,
        # `disable=None` shows the bar only on terminals.
        tqdm(
            total=total,
            initial=file.tell(),
            desc=path.stem,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=None,
        ) as bar,
    ):
        while chunk := response.read(CHUNK_BYTES):
            file.write(chunk)
            bar.update(len(chunk))


def _version(headers: Message) -> str:
    """Return the version of a file from the headers of a response. A later request sends it in `If-Range`.

    This is the ETag. `If-Range` must not hold a weak ETag (RFC 9110, section 13.1.5). Without a strong one it is
    `Last-Modified` or, if that is missing too, an empty string.
    """
    tag = headers.get("ETag", "")
    return headers.get("Last-Modified", "") if tag.startswith("W/") or not tag else tag


def _check_md5(partial: _Partial, headers: Message) -> None:
    """Compare a file with the MD5 hash in the header `x-goog-hash`, if the response has it. Remove a wrong file.

    Raises:
        OSError: The hashes differ.
    """
    hashes = ",".join(headers.get_all("x-goog-hash", [])).split(",")
    announced = [entry.strip().removeprefix("md5=") for entry in hashes if entry.strip().startswith("md5=")]
    if not announced:
        return
    with partial.path.open("rb") as file:
        found = base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()
    if found != announced[0]:
        partial.discard()
        raise OSError(f"its MD5 is {found}, but the server says {announced[0]}: the downloaded bytes were removed")
