import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from surm_jax.errors import UserError
from surm_jax.pretrained.download import cache_path, download

CONTENT = bytes(range(256)) * 8192  # two chunks


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        if self.path.startswith("/absent"):
            self.send_error(404)
            return
        self.send_response(200)
        if "unsized" not in self.path:
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if "stalled" in self.path:
            self.server.stop.wait(5)
            return
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if "short" in self.path else CONTENT)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("SURM_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.stop = [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.stop.set()
        server.shutdown()
        thread.join()


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_fetched_once(server):
    url = f"{server.url}/models/vit.npz"
    path = download(url)
    assert path == cache_path(url)
    assert path.suffix == ".npz"
    assert path.read_bytes() == CONTENT
    assert download(url) == path
    assert server.requests == ["/models/vit.npz"]


def test_without_content_length(server):
    assert download(f"{server.url}/unsized.npz").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "reason"), [("short.npz", "1048576 of 2097152 bytes"), ("absent.npz", "404|Not Found")]
)
def test_failures_leave_nothing_behind(server, tmp_path, name, reason):
    url = f"{server.url}/{name}"
    with pytest.raises(UserError, match=reason) as error:
        download(url)
    assert url in str(error.value)
    assert str(cache_path(url)) in str(error.value)
    assert files(tmp_path) == []


def test_a_server_that_falls_silent(server, tmp_path, monkeypatch):
    monkeypatch.setattr("surm_jax.pretrained.download.TIMEOUT_SECONDS", 0.2)
    with pytest.raises(UserError, match="timed out"):
        download(f"{server.url}/stalled.npz")
    assert files(tmp_path) == []


def test_no_connection_says_at_once_which_file_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("SURM_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as closed:  # bound, but nobody listens
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
