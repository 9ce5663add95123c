"""Models of the Hugging Face Hub by name, `hf://owner/name@revision`, through `huggingface_hub`.

That library keeps the cache (`$HF_HOME`), shows progress and checks sizes and hashes. Here it is only said what to
fetch, in which order, and what to do where there is no network.
"""

import contextlib
import re
from pathlib import Path
from typing import NoReturn

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from surm_jax.errors import UserError
from surm_jax.files import cache_root
from surm_jax.pretrained.hf.folder import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, read_architecture
from surm_jax.pretrained.normalization import PREPROCESSOR_NAME
from surm_jax.tensor_files import shards_of

PREFIX = "hf://"

TOKENIZER_NAMES = ("tokenizer.json", "vocab.txt", "merges.txt", "vocab.json", "tokenizer_config.json")
"""What a tokenizer may be made of. No repository has to have all of them, or any."""


def fetch(source: str) -> Path:
    """Returns the folder with a model of the Hub, fetching what is not in the cache of `huggingface_hub` yet.

    `config.json` comes first: a model that there is none of here costs no download. Then comes what tells how its input
    is made, as far as there is any: the tokenizer's files of a text model, `preprocessor_config.json` of another. Last
    come the safetensors. All are of one commit. A model that is complete in the cache is used as it is, without asking
    the Hub whether a branch has moved since: for another commit, name it. One that was cached without a tokenizer or
    `preprocessor_config.json` is used without where the Hub has none or cannot be reached.

    Args:
        source: "hf://owner/name" or "hf://owner/name@revision", a branch, a tag, a commit or "refs/pr/1".

    Raises:
        UserError: the name is malformed, there is no such repository, revision or safetensors in it, its model is none
            of ours, or the Hub cannot be reached; the message then says which files to put into a folder by hand.
    """
    repository, revision = _parse(source)
    try:
        if folder := _cached(repository, revision):
            _complete(repository, folder)
            return folder
        _ask(repository, revision)
        folder = Path(hf_hub_download(repository, CONFIG_NAME, revision=revision)).parent
        commit = folder.name
        _fetch_present(repository, commit, _input_names(folder))
        try:
            hf_hub_download(repository, WEIGHTS_NAME, revision=commit)
        except RemoteEntryNotFoundError:
            index = hf_hub_download(repository, INDEX_NAME, revision=commit)
            for shard in sorted({*shards_of(Path(index)).values()}):
                hf_hub_download(repository, shard, revision=commit)
        return folder
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except (OSError, HTTPError, HFValidationError) as error:
        _explain(error, source, repository, revision)


def _parse(source: str) -> tuple[str, str]:
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./+-]+))?", source)
    if not match or ".." in source:
        raise UserError(
            f"a model of the Hugging Face Hub is named hf://owner/name or hf://owner/name@revision, got {source!r}"
        )
    return match[1], match[2] or constants.DEFAULT_REVISION


def _cached(repository: str, revision: str) -> Path | None:
    """Returns the folder of a model in the cache, if it is complete."""

    def find(name: str) -> Path | None:
        found = try_to_load_from_cache(repository, name, revision=revision)
        return Path(found) if isinstance(found, str) else None

    config = find(CONFIG_NAME)
    if config is None:
        return None
    if find(WEIGHTS_NAME) is None:
        index = find(INDEX_NAME)
        if index is None or not all(map(find, {*shards_of(index).values()})):
            return None
    return config.parent


def _complete(repository: str, folder: Path) -> None:
    """Fetches what tells how the input of a cached model is made, if that was never asked for and the Hub answers."""
    commit, names = folder.name, _input_names(folder)
    # A path, an object for what the Hub is known not to have, or None.
    known = [try_to_load_from_cache(repository, name, revision=commit) for name in names]
    if None not in known or any(isinstance(path, str) for path in known):
        return
    with contextlib.suppress(OSError, HTTPError):
        _ask(repository, commit)
        _fetch_present(repository, commit, names)


def _ask(repository: str, revision: str) -> None:
    """Asks for the model once: hf_hub_download would repeat the question for 23 seconds where there is no network."""
    get_hf_file_metadata(hf_hub_url(repository, CONFIG_NAME, revision=revision))


def _input_names(folder: Path) -> tuple[str, ...]:
    """Returns the files that tell how the input of a model is made, whether its repository has them or not."""
    architecture, _ = read_architecture(folder)
    return TOKENIZER_NAMES if architecture.model.reads == "text" else (PREPROCESSOR_NAME,)


def _fetch_present(repository: str, commit: str, names: tuple[str, ...]) -> None:
    """Fetches those of the files that there are."""
    for name in names:
        with contextlib.suppress(RemoteEntryNotFoundError):
            hf_hub_download(repository, name, revision=commit)


def _explain(error: Exception, source: str, repository: str, revision: str) -> NoReturn:
    """Raises the one error that says what went wrong and what to do."""
    page = f"{constants.ENDPOINT}/{repository}"
    if isinstance(error, HFValidationError):
        message = str(error)
    elif isinstance(error, GatedRepoError):
        message = f"access is granted at {page}; accept its conditions there, then log in (`hf auth login`)"
    elif isinstance(error, RepositoryNotFoundError):
        message = f"there is no {page}, or it is private: then log in (`hf auth login`)"
    elif isinstance(error, RevisionNotFoundError):
        message = f"{page} has no revision {revision!r}"
    elif isinstance(error, RemoteEntryNotFoundError):
        name = str(error.response.url).rsplit("/", 1)[-1]
        what = f"{WEIGHTS_NAME}, nor the shards of one" if name == INDEX_NAME else name
        message = (
            f"{page} has no {what} at revision {revision!r}. Other formats, such as pickles, are not loaded; "
            "https://huggingface.co/spaces/safetensors/convert adds safetensors to a repository (refs/pr/N)"
        )
    else:
        folder = cache_root() / "hub" / repository
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        message = (
            f"there is no answer from the Hub ({reason}). On a machine that has one, fetch {CONFIG_NAME} and "
            f"{WEIGHTS_NAME}, or {INDEX_NAME} with all files that it lists, of {page}/tree/{revision}, and what there "
            f"is of {', '.join((*TOKENIZER_NAMES, PREPROCESSOR_NAME))}; put them into the folder {folder}, and pass "
            "that folder as the checkpoint"
        )
    raise UserError(f"cannot fetch {source}: {message}") from error
