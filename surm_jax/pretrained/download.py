"""Download files into the cache. A file is complete or absent, and an interrupted download can be resumed."""

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
    """Return where the file of a URL is kept: `<cache_root()>/<host>/<path>`.

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
    if split.query:  # another query may be another file
        query = quote(split.query, safe="")
        folders.insert(-1, query if len(query) <= _LONGEST_NAME else hashlib.sha256(query.encode()).hexdigest())
    host = f"{split.hostname}_{port}" if port else split.hostname
    return cache_root().joinpath(host, *folders)


def download(url: str) -> Path:
    """Return the local copy of a file, and download it if there is none yet.

    The file gets its name only when it is complete. If a connection breaks, the bytes that have arrived stay in a
    `.part` file next to it. The next call downloads the rest if the server still has the same file, judged by its ETag
    or its date. If Google Cloud Storage announces an MD5, it is checked. If several processes want the file, one
    downloads it and the others wait. A terminal shows a progress bar.

    Raises:
        UserError: The file cannot be downloaded (no connection within 10 seconds, an HTTP error, fewer bytes than
            announced, another MD5) or written. The message says which file to put where by hand.
    """
    target = cache_path(url)
    if target.is_file():
        return target
    partial = _Partial(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f"{target.name}.lock")):
            if not target.is_file():  # another process may have downloaded it meanwhile
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
    """A partly downloaded file, and its version: the `ETag` or `Last-Modified` of the server."""

    def __init__(self, target: Path):
        self.path = target.with_name(f"{target.name}.part")
        self._version = target.with_name(f"{target.name}.part.version")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def version(self) -> str:
        return self._version.read_text() if self._version.is_file() else ""

    def start(self, version: str) -> None:
        """Start again with no bytes. Old bytes are removed first, so they are never taken for another version."""
        self.discard()
        if version:
            self._version.write_text(version)
        self.path.touch()

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._version.unlink(missing_ok=True)


def _fetch(url: str, partial: _Partial) -> None:
    """Complete a partial file. After a failure keep it if the rest can be requested later, else remove it."""
    try:
        start = partial.size()
        # With If-Range the server sends the whole file if it has another version by now.
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
    """Append the body of a response to a file."""
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
    """Return the version to send as `If-Range`, which must not be a weak ETag (RFC 9110, section 13.1.5)."""
    tag = headers.get("ETag", "")
    return headers.get("Last-Modified", "") if tag.startswith("W/") or not tag else tag


def _check_md5(partial: _Partial, headers: Message) -> None:
    """Compare a file with the MD5 in the header `x-goog-hash`, if there is one, and remove the file if they differ."""
    hashes = ",".join(headers.get_all("x-goog-hash", [])).split(",")
    announced = [entry.strip().removeprefix("md5=") for entry in hashes if entry.strip().startswith("md5=")]
    if not announced:
        return
    with partial.path.open("rb") as file:
        found = base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()
    if found != announced[0]:
        partial.discard()
        raise OSError(f"its MD5 is {found}, but the server says {announced[0]}: the downloaded bytes were removed")
