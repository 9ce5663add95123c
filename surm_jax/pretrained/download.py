"""Fetching a file once: cached, complete or absent, and quick to say what to do where there is no network."""

import http.client
import logging
import os
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote, urlsplit

from tqdm import tqdm

from surm_jax.atomic import replacing
from surm_jax.errors import UserError

TIMEOUT_SECONDS = 10
CHUNK_BYTES = 1 << 20

log = logging.getLogger(__name__)


def cache_path(url: str) -> Path:
    """Returns where the file of a URL is kept: `<cache>/<host>/<path>`.

    The cache is the folder `$SURM_JAX_CACHE`, or else `~/.cache/surm_jax`.

    Raises:
        UserError: the URL does not end in a file name.

    >>> cache_path("https://example.org/vit/b16.npz").parts[-3:]
    ('example.org', 'vit', 'b16.npz')
    """
    split = urlsplit(url)
    folders = [part for part in split.path.split("/") if part]
    if not split.hostname or not folders or split.path.endswith("/") or {".", ".."} & {*folders}:
        raise UserError(f"the URL must name a host and a file, such as https://example.org/vit.npz, got {url!r}")
    if split.query:  # another query may be another file
        folders.insert(-1, quote(split.query, safe=""))
    host = f"{split.hostname}_{split.port}" if split.port else split.hostname
    root = os.environ.get("SURM_JAX_CACHE") or Path.home() / ".cache" / "surm_jax"
    return Path(root).expanduser().joinpath(host, *folders)


def download(url: str) -> Path:
    """Returns the local copy of a file, fetching it if it is not there yet.

    The file appears under its name only when it is complete. A progress bar is shown on a terminal.

    Raises:
        UserError: it cannot be fetched (no connection within 10 seconds, an HTTP error, fewer bytes than announced) or
            kept. The message says which file to put where by hand.
    """
    target = cache_path(url)
    if target.is_file():
        return target
    log.info("downloading %s to %s", url, target)
    try:
        with replacing(target) as temporary, urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            announced = response.headers.get("Content-Length")
            total = int(announced) if announced else None
            _copy(response, temporary, total, target.name)
            received = temporary.stat().st_size
            if total is not None and received != total:
                raise OSError(f"the connection ended after {received} of {total} bytes")
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise UserError(
            f"cannot download {url} ({reason}): fetch this file on a machine that can, and put it at {target}"
        ) from error
    return target


def _copy(response: http.client.HTTPResponse, path: Path, total: int | None, name: str) -> None:
    """Writes the body of a response to a file."""
    with (
        path.open("wb") as file,
        # `disable=None` shows the bar on terminals only.
        tqdm(total=total, desc=name, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar,
    ):
        while chunk := response.read(CHUNK_BYTES):
            file.write(chunk)
            bar.update(len(chunk))
