import base64
import hashlib
import multiprocessing
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from surm_jax.errors import UserError
from surm_jax.pretrained.download import cache_path, download

CONTENT = bytes(range(256)) * 8192  # This is as large as two chunks.
HALF = len(CONTENT) // 2


class Handler(BaseHTTPRequestHandler):
    """An HTTP handler that serves `server.content`. The other attributes of the server say how it answers."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        if self.path.startswith("/absent"):
            self.send_error(404)
            return
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = 0
        if server.ranges and begin and self.headers.get("If-Range") in (None, *server.version.values()):
            start = int(begin[1])
        if start >= len(server.content) > 0:
            self.send_error(416)
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            shown = start + server.shift
            self.send_header("Content-Range", f"bytes {shown}-{len(server.content) - 1}/{len(server.content)}")
        for name, value in {**server.version, **server.extra}.items():
            self.send_header(name, value)
        if server.sized:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.stalled:
            server.stop.wait(5)
            return
        server.stop.wait(server.delay)
        self.wfile.write(body[: server.most])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("SURM_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.stop = [], threading.Event()
        server.content, server.most, server.sized, server.stalled = CONTENT, len(CONTENT), True, False
        server.ranges, server.version, server.extra, server.shift = True, {"ETag": '"one"'}, {}, 0
        server.delay = 0.0
        server.url = f"http://127.0.0.1:{server.server_port}/models/vit.npz"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.stop.set()
        server.shutdown()
        thread.join()


def left(url):
    """Return the size of each file in the folder of a download, by name, without the lock file."""
    return {path.name: path.stat().st_size for path in cache_path(url).parent.iterdir() if path.suffix != ".lock"}


def cut(server, most=HALF):
    """Download with a connection that breaks after `most` bytes, and return the error message."""
    server.most = most
    with pytest.raises(UserError) as error:
        download(server.url)
    server.most = len(server.content)
    return str(error.value)


def test_fetched_once(server):
    path = download(server.url)
    assert path == cache_path(server.url)
    assert path.suffix == ".npz"
    assert path.read_bytes() == CONTENT
    assert download(server.url) == path
    assert server.requests == [("/models/vit.npz", None, None)]
    assert left(server.url) == {"vit.npz": len(CONTENT)}


def test_without_content_length(server):
    server.sized = False
    assert download(server.url).read_bytes() == CONTENT


def test_a_broken_connection_is_resumed_with_the_rest_alone(server):
    message = cut(server)
    assert f"{HALF} of {len(CONTENT)} bytes" in message
    assert "call again to fetch the rest" in message
    assert str(cache_path(server.url)) in message
    assert left(server.url)["vit.npz.part"] == HALF
    assert not cache_path(server.url).exists()
    # The first half of the server's content is now different. Only if the download is resumed is the result the old
    # content.
    server.content = bytes(HALF) + CONTENT[HALF:]
    assert download(server.url).read_bytes() == CONTENT
    assert server.requests[1:] == [("/models/vit.npz", f"bytes={HALF}-", '"one"')]
    assert left(server.url) == {"vit.npz": len(CONTENT)}


def test_resumed_twice(server):
    cut(server, 1000)
    cut(server, 500)
    assert left(server.url)["vit.npz.part"] == 1500
    assert download(server.url).read_bytes() == CONTENT
    assert [request[1] for request in server.requests] == [None, "bytes=1000-", "bytes=1500-"]


@pytest.mark.parametrize("etag", [{}, {"ETag": 'W/"weak"'}])
def test_resumed_by_date_where_the_etag_does_not_name_the_bytes(server, etag):
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    server.version = {**etag, "Last-Modified": date}
    cut(server)
    assert download(server.url).read_bytes() == CONTENT
    assert server.requests[1] == ("/models/vit.npz", f"bytes={HALF}-", date)


def test_another_version_by_now_starts_over(server):
    cut(server)
    server.content, server.version = CONTENT[::-1], {"ETag": '"two"'}
    assert download(server.url).read_bytes() == CONTENT[::-1]
    assert server.requests[1][1:] == (f"bytes={HALF}-", '"one"')
    assert left(server.url) == {"vit.npz": len(CONTENT)}


def test_a_server_without_ranges_starts_over(server):
    server.ranges = False
    cut(server)
    assert download(server.url).read_bytes() == CONTENT


def test_without_a_version_nothing_is_kept(server):
    server.version = {}
    assert "call again" not in cut(server)
    assert left(server.url) == {}
    assert download(server.url).read_bytes() == CONTENT
    assert server.requests[1][1] is None


def test_a_file_that_became_shorter_starts_over(server):
    cut(server)
    server.content = CONTENT[:100]
    assert download(server.url).read_bytes() == CONTENT[:100]
    assert [request[1] for request in server.requests] == [None, f"bytes={HALF}-", None]


def test_the_wrong_range_is_not_appended(server):
    cut(server)
    server.shift = 7
    with pytest.raises(UserError, match=f"asked for bytes from {HALF}, got bytes {HALF + 7}-"):
        download(server.url)
    assert left(server.url)["vit.npz.part"] == HALF


def test_parts_of_a_process_that_was_killed(server):
    """Check that a download starts from the beginning if the version of the partial file is unknown."""
    part = cache_path(server.url).with_name("vit.npz.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"of another file")
    assert download(server.url).read_bytes() == CONTENT
    assert server.requests == [("/models/vit.npz", None, None)]


def google_hash(content):
    return {"x-goog-hash": f"crc32c=AAAAAA==,md5={base64.b64encode(hashlib.md5(content).digest()).decode()}"}


def test_md5_of_google_cloud_storage(server):
    server.extra = google_hash(CONTENT)
    cut(server)
    assert download(server.url).read_bytes() == CONTENT


@pytest.mark.parametrize("resumed", [False, True])
def test_another_md5_removes_what_had_arrived(server, resumed):
    if resumed:
        cut(server)
    server.extra = google_hash(CONTENT[1:])
    with pytest.raises(UserError, match=r"its MD5 is .*, but the server says .*bytes were removed") as error:
        download(server.url)
    assert "call again" not in str(error.value)
    assert left(server.url) == {}
    server.extra = {}
    assert download(server.url).read_bytes() == CONTENT


def _download(url):
    return download(url).read_bytes() == CONTENT


@pytest.mark.exhaustive
def test_several_processes_fetch_it_once(server):
    server.delay = 1.0
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.map(_download, [server.url] * 3) == [True] * 3
    assert len(server.requests) == 1
    assert left(server.url) == {"vit.npz": len(CONTENT)}


def test_a_path_that_is_not_ascii(server):
    server.url = server.url.replace("models", "modèles à part")
    assert download(server.url).read_bytes() == CONTENT
    assert server.requests == [("/mod%C3%A8les%20%C3%A0%20part/vit.npz", None, None)]


def test_the_query_of_a_signed_url_is_too_long_for_a_name(server):
    urls = [f"{server.url}?signature={'a%2F' * 100}{i}" for i in range(2)]
    assert [download(url).read_bytes() for url in urls] == [CONTENT] * 2
    assert [request[0] for request in server.requests] == ["/models" + url.partition("/models")[2] for url in urls]


def test_a_length_that_is_no_number(server):
    server.sized, server.extra = False, {"Content-Length": "abc"}
    with pytest.raises(UserError, match="the server announces 'abc' bytes"):
        download(server.url)


def test_absent(server):
    url = server.url.replace("models", "absent")
    with pytest.raises(UserError, match=r"404|Not Found") as error:
        download(url)
    assert url in str(error.value)
    assert f"put it at {cache_path(url)}" in str(error.value)
    assert left(url) == {}


def test_a_server_that_stalls(server, monkeypatch):
    monkeypatch.setattr("surm_jax.pretrained.download.TIMEOUT_SECONDS", 0.2)
    server.stalled = True
    with pytest.raises(UserError, match="timed out"):
        download(server.url)
    assert left(server.url) == {}


def test_no_connection_says_at_once_which_file_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("SURM_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as closed:  # The port is bound, but no program listens on it.
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/vit/b16.npz"
        start = time.monotonic()
        with pytest.raises(UserError, match="refused") as error:
            download(url)
    assert time.monotonic() - start < 5
    assert f"cannot download {url}" in str(error.value)
    assert f"put it at {cache_path(url)}" in str(error.value)
    cache_path(url).write_bytes(b"by hand")
    assert download(url).read_bytes() == b"by hand"


def test_cache_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("SURM_JAX_CACHE", str(tmp_path))
    assert cache_path("https://a.org/x/vit.npz") == tmp_path / "a.org" / "x" / "vit.npz"
    urls = ["https://a.org/vit.npz", "https://b.org/vit.npz", "https://a.org/vit.npz?v=1", "https://a.org:99/vit.npz"]
    assert len({cache_path(url) for url in urls}) == len(urls)
    assert all(cache_path(url).name == "vit.npz" for url in urls)
    monkeypatch.delenv("SURM_JAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_path("https://a.org/vit.npz") == tmp_path / "home/.cache/surm_jax/a.org/vit.npz"


@pytest.mark.parametrize(
    "url", ["https://a.org", "https://a.org/folder/", "https://a.org/../../vit.npz", "http:///vit.npz"]
)
def test_urls_without_a_file(url):
    with pytest.raises(UserError, match="must name a host and a file"):
        download(url)


@pytest.mark.parametrize("url", ["https://a.org:port/vit.npz", "http://[::1/vit.npz", "http://a.org:99999/vit.npz"])
def test_what_is_no_url(url):
    with pytest.raises(UserError, match="is not a URL: "):
        download(url)
