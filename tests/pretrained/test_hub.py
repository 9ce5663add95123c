"""Test downloads from the Hugging Face Hub with a local server that answers as the Hub does."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from surm_jax.errors import UserError
from surm_jax.pretrained import hub, locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = json.dumps({"model_type": "vit"})
INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
WHOLE = {"config.json": CONFIG, "model.safetensors": "whole", "pytorch_model.bin": "pickle"}
SHARDED = {
    "config.json": CONFIG,
    "model.safetensors.index.json": INDEX,
    "model-1.safetensors": "one",
    "model-2.safetensors": "two",
}
TEXT = {"config.json": json.dumps({"model_type": "bert"}), "model.safetensors": "whole"}
TOKENIZERS = [
    {"tokenizer.json": "{}", "tokenizer_config.json": '{"do_lower_case": true}', "vocab.txt": "[PAD]"},
    {"vocab.txt": "[PAD]"},
    {"vocab.json": "{}", "merges.txt": "#version: 0.2"},
    {},
]


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        owner, name, resolve, revision, file = self.path.lstrip("/").split("/", 4)
        assert resolve == "resolve"
        repository = self.server.repositories.get(f"{owner}/{name}")
        files = repository and repository.get(unquote(revision), repository.get("main") if revision == COMMIT else None)
        self.server.requests.append((self.command, unquote(revision), file))
        if repository is None or files is None or files == "gated" or file not in files:
            code = "RepoNotFound" if repository is None else "RevisionNotFound" if files is None else "EntryNotFound"
            self.send_response(403 if files == "gated" else 404)
            self.send_header("X-Error-Code", "GatedRepo" if files == "gated" else code)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = files[file].encode()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("SURM_JAX_CACHE", str(tmp_path / "ours"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.repositories = [], {}
        server.url = f"http://127.0.0.1:{server.server_port}"
        # The library sets these constants from HF_ENDPOINT and HF_HOME when it is imported.
        monkeypatch.setattr(hub.constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def got(server):
    return [file for command, _, file in server.requests if command == "GET"]


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_whole_model_comes_once(fake):
    fake.repositories["google/vit"] = {"main": WHOLE}
    folder = locate("hf://google/vit")
    # The pickle is not downloaded.
    assert contents(folder) == {"config.json": CONFIG, "model.safetensors": "whole"}
    assert got(fake) == ["config.json", "model.safetensors"]
    # All files belong to the same commit, even if the branch gets a new commit during the download.
    assert [revision for command, revision, _ in fake.requests if command == "GET"] == ["main", COMMIT]
    fake.requests.clear()
    assert locate("hf://google/vit") == folder
    assert fake.requests == []


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/3"])
def test_revision(fake, revision):
    fake.repositories["google/vit"] = {"main": WHOLE, revision: {**WHOLE, "config.json": CONFIG + " "}}
    folder = hub.fetch(f"hf://google/vit@{revision}")
    assert contents(folder)["config.json"] == CONFIG + " "
    assert {revision for _, revision, _ in fake.requests} == {revision, COMMIT}
    with pytest.raises(UserError, match=r"google/vit has no revision 'v2'"):
        hub.fetch("hf://google/vit@v2")


def test_shards(fake):
    fake.repositories["google/vit"] = {"main": SHARDED}
    folder = hub.fetch("hf://google/vit")
    assert contents(folder) == SHARDED
    assert got(fake)[0] == "config.json"
    fake.requests.clear()
    assert hub.fetch("hf://google/vit") == folder
    assert fake.requests == []


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_tokenizer_of_a_text_model(fake, tokenizer):
    settings = dict.fromkeys(("special_tokens_map.json", "added_tokens.json", *hub.SETTINGS_NAMES), "{}")
    fake.repositories["google/bert"] = {"main": TEXT | tokenizer | settings | {"README.md": "text"}}
    folder = hub.fetch("hf://google/bert")
    assert contents(folder) == TEXT | tokenizer | settings
    assert got(fake)[-1] == "model.safetensors"
    fake.requests.clear()
    assert hub.fetch("hf://google/bert") == folder
    assert fake.requests == []


def test_the_preprocessor_of_an_image_model(fake):
    preprocessor = dict.fromkeys(hub.SETTINGS_NAMES, "{}")
    fake.repositories["google/vit"] = {"main": WHOLE | preprocessor | TOKENIZERS[0]}
    assert contents(hub.fetch("hf://google/vit")).keys() == {"config.json", "model.safetensors", *preprocessor}


def cached_without_tokenizer(fake, *names):
    """Return the cached folder of a model that lacks files of the tokenizer, except for `names`."""
    fake.repositories["google/bert"] = {"main": TEXT | TOKENIZERS[0]}
    for name in (*TEXT, *names):
        folder = Path(hub.hf_hub_download("google/bert", name)).parent
    fake.requests.clear()
    return folder


@pytest.mark.parametrize("names", [(), ("tokenizer.json",)])
def test_a_tokenizer_comes_later(fake, names):
    folder = cached_without_tokenizer(fake, *names)
    assert contents(folder).keys() == {*TEXT, *names}
    assert hub.fetch("hf://google/bert") == folder
    assert contents(folder) == TEXT | TOKENIZERS[0]
    # The weights are not downloaded again, and the new files belong to the same commit.
    assert sorted(got(fake)) == sorted(TOKENIZERS[0].keys() - names)
    assert {revision for _, revision, _ in fake.requests} == {COMMIT}
    fake.requests.clear()
    assert hub.fetch("hf://google/bert") == folder
    assert fake.requests == []


@pytest.mark.parametrize("why", ["none there", "gone", "gated", "no network"])
def test_a_cached_model_does_without_a_tokenizer(fake, monkeypatch, why):
    folder = cached_without_tokenizer(fake)
    if why == "none there":
        fake.repositories["google/bert"] = {"main": TEXT}
    elif why == "gone":
        fake.repositories.clear()
    elif why == "gated":
        fake.repositories["google/bert"] = {"main": "gated"}
    else:
        monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    start = time.monotonic()
    warned = pytest.warns(UserWarning, match="bert is used without the files tokenizer.json, .* added_tokens.json")
    with contextlib.nullcontext() if why == "none there" else warned:
        assert hub.fetch("hf://google/bert") == folder
    assert time.monotonic() - start < 2
    assert contents(folder) == TEXT
    assert bool(fake.requests) == (why != "no network")
    # If the Hub has answered that it does not have the files, they are not requested again.
    fake.requests.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert hub.fetch("hf://google/bert") == folder
    assert bool(fake.requests) == (why in ("gone", "gated"))


def test_what_is_missing_is_fetched(fake):
    """Check that the next call completes a download that was interrupted between two shards."""
    fake.repositories["google/vit"] = {"main": {k: v for k, v in SHARDED.items() if k != "model-2.safetensors"}}
    with pytest.raises(UserError, match=r"has no model-2\.safetensors at revision 'main'"):
        hub.fetch("hf://google/vit")
    fake.repositories["google/vit"] = {"main": SHARDED}
    fake.requests.clear()
    assert contents(hub.fetch("hf://google/vit")) == SHARDED
    assert got(fake) == ["model-2.safetensors"]


def test_shards_outside_the_folder_are_not_fetched(fake):
    index = INDEX.replace("model-2.safetensors", "../../evil.safetensors")
    fake.repositories["google/vit"] = {"main": {**SHARDED, "model.safetensors.index.json": index}}
    with pytest.raises(UserError, match=r"hf://google/vit: .*lists the shard '../../evil.safetensors'"):
        hub.fetch("hf://google/vit")
    assert got(fake) == ["config.json", "model.safetensors.index.json"]


def test_an_unknown_model_stops_before_its_weights(fake):
    fake.repositories["meta/llama"] = {"main": {**WHOLE, "config.json": json.dumps({"model_type": "vits"})}}
    with pytest.raises(UserError, match=r"hf://meta/llama: .*model_type = 'vits'; known are .*did you mean 'vit'"):
        hub.fetch("hf://meta/llama")
    assert {file for _, _, file in fake.requests} == {"config.json"}


def test_pickles_alone(fake):
    fake.repositories["old/vit"] = {"main": {"config.json": CONFIG, "pytorch_model.bin": "pickle"}}
    with pytest.raises(UserError, match=r"old/vit has no model\.safetensors and no shards .*safetensors/convert"):
        hub.fetch("hf://old/vit")


def test_no_such_repository(fake):
    with pytest.raises(UserError, match=rf"there is no {fake.url}/nobody/nothing, or it is private: .*hf auth login"):
        hub.fetch("hf://nobody/nothing")


def test_gated(fake):
    fake.repositories["meta/secret"] = {"main": "gated"}
    with pytest.raises(UserError, match=rf"accept its conditions at {fake.url}/meta/secret, .*hf auth login"):
        hub.fetch("hf://meta/secret")


def test_no_config(fake):
    fake.repositories["a/b"] = {"main": {"model.safetensors": "x"}}
    with pytest.raises(UserError, match=r"a/b has no config\.json at revision 'main'"):
        hub.fetch("hf://a/b")


def test_malformed_names(fake):
    for source in ("hf://vit", "hf://a/b/c", "hf://a/b@", "hf://a/b@../x", "hf://../b"):
        with pytest.raises(UserError, match=r"is named hf://owner/name or hf://owner/name@revision, got"):
            hub.fetch(source)
    with pytest.raises(UserError, match="cannot fetch hf://a--b/c"):
        hub.fetch("hf://a--b/c")
    assert fake.requests == []


def assert_says_what_to_do(message, page, cache):
    folder = cache / "hub" / "google" / "vit"
    names = ("config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "vocab.txt")
    for part in (*names, f"{page}/tree/v1", str(folder)):
        assert part in message
    assert message.endswith("pass that folder as the checkpoint")
    assert len(message.splitlines()) == 1


def test_no_network_says_at_once_what_to_put_where(fake, tmp_path, monkeypatch):
    for name, value in (("ENDPOINT", "http://127.0.0.1:9"), ("HUGGINGFACE_CO_URL_TEMPLATE", None)):
        template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(hub.constants, name, value or template)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"no answer from the Hub .*refused") as error:
        hub.fetch("hf://google/vit@v1")
    assert time.monotonic() - start < 2
    assert_says_what_to_do(str(error.value), "http://127.0.0.1:9/google/vit", tmp_path / "ours")


@pytest.mark.exhaustive
def test_environment_and_offline_mode(fake, tmp_path):
    """Check that the library's environment variables work, and that its offline mode uses the cache."""
    fake.repositories |= {"google/vit": {"main": WHOLE}, "google/bert": {"main": TEXT | TOKENIZERS[0]}}
    program = """
import sys
from surm_jax.pretrained import hub
for source in sys.argv[1:]:
    try:
        print(hub.fetch(source))
    except ValueError as error:
        print(error)
"""

    def fetch(*sources, **variables):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": fake.url}
        return subprocess.run(
            [sys.executable, "-c", program, *sources],
            env={**environment, **variables},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        ).stdout.splitlines()

    folder, text = fetch("hf://google/vit", "hf://google/bert")
    assert folder.startswith(str(tmp_path / "home"))
    assert contents(Path(folder))["model.safetensors"] == "whole"
    for name in TOKENIZERS[0]:
        (Path(text) / name).unlink()
    fake.requests.clear()
    *cached, message = fetch("hf://google/vit", "hf://google/bert", "hf://google/vit@v1", HF_HUB_OFFLINE="1")
    assert cached == [folder, text]
    assert fake.requests == []
    assert "HF_HUB_OFFLINE" in message
    assert_says_what_to_do(message, f"{fake.url}/google/vit", tmp_path / "ours")
