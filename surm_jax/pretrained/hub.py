"""Download models from the Hugging Face Hub, under names of the form `hf://owner/name@revision`.

The library `huggingface_hub` manages the cache (`$HF_HOME`), shows progress bars, and checks sizes and hashes. This
module chooses the files to download and their order, and explains errors.
"""

import contextlib
import re
import warnings
from collections.abc import Sequence
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
from surm_jax.pretrained.image_processor import PREPROCESSOR_NAME, PROCESSOR_NAME
from surm_jax.tensor_files import shards_of

PREFIX = "hf://"

TOKENIZER_NAMES = (
    *("tokenizer.json", "vocab.txt", "merges.txt", "vocab.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
"""The names of all files that a tokenizer may consist of. A repository may lack some of them."""

SETTINGS_NAMES = (PREPROCESSOR_NAME, PROCESSOR_NAME, "generation_config.json")
"""The names of the other files of settings that may lie beside a model. A repository may lack some of them."""


def fetch(source: str) -> Path:
    """Download the files of a Hub model that are not in the cache yet, and return the local folder of the model.

    `config.json` comes first, so that a model of an unknown architecture is refused before its weights are downloaded.
    Next are the files that describe the model's input: `SETTINGS_NAMES`, and for a text model also `TOKENIZER_NAMES`.
    The weights are last, in safetensors files. All files belong to the same commit.

    If the configuration and the weights are in the cache, they are used without asking the Hub for a newer commit. To
    use a newer one, give it as the revision. Only files that describe the input and were never requested are requested
    now. If this fails, a warning names them.

    Args:
        source: "hf://owner/name" or "hf://owner/name@revision". The revision is a branch, a tag, a commit or a pull
            request such as "refs/pr/1". The default is the main branch.

    Raises:
        UserError: The name is malformed, the repository, its revision or its safetensors do not exist, the model's
            architecture is unknown, or the Hub cannot be reached. In the last case the message says which files to copy
            into which folder.
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
    """Return the folder of a model in the cache, or `None` if its configuration or some of its weights are missing."""

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
    """Download the settings of the tokeniser or image processor of a cached model, unless they were requested before.

    The cache also knows which files the repository lacks, so that they are requested only once.
    """
    commit = folder.name
    # For each file the library returns its path, or an object that marks a file that the repository lacks, or None.
    unknown = [
        name for name in _input_names(folder) if try_to_load_from_cache(repository, name, revision=commit) is None
    ]
    if not unknown:
        return
    try:
        _ask(repository, commit)
        _fetch_present(repository, commit, unknown)
    except (OSError, HTTPError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        warnings.warn(
            f"{PREFIX}{repository} is used without the files {', '.join(unknown)}, if it has them: they are not in the"
            f" cache, and the Hub gave no answer ({reason})",
            stacklevel=2,
        )


def _ask(repository: str, revision: str) -> None:
    """Send one request to the Hub, for the metadata of the model's `config.json`.

    Without a network this fails at once, whereas `hf_hub_download` would retry for 23 seconds.
    """
    get_hf_file_metadata(hf_hub_url(repository, CONFIG_NAME, revision=revision))


def _input_names(folder: Path) -> tuple[str, ...]:
    """Return the names of the files that may describe the input of the model in a folder."""
    architecture, _ = read_architecture(folder)
    return SETTINGS_NAMES if architecture.model.reads == "images" else (*TOKENIZER_NAMES, *SETTINGS_NAMES)


def _fetch_present(repository: str, commit: str, names: Sequence[str]) -> None:
    """Download those of the named files that the repository has."""
    for name in names:
        with contextlib.suppress(RemoteEntryNotFoundError):
            hf_hub_download(repository, name, revision=commit)


def _explain(error: Exception, source: str, repository: str, revision: str) -> NoReturn:
    """Raise a `UserError` which explains why a download failed and what the user can do."""
    page = f"{constants.ENDPOINT}/{repository}"
    if isinstance(error, HFValidationError):
        message = str(error)
    elif isinstance(error, GatedRepoError):
        message = f"the model is gated: accept its conditions at {page}, then log in (`hf auth login`)"
    elif isinstance(error, RepositoryNotFoundError):
        message = f"there is no {page}, or it is private: then log in (`hf auth login`)"
    elif isinstance(error, RevisionNotFoundError):
        message = f"{page} has no revision {revision!r}"
    elif isinstance(error, RemoteEntryNotFoundError):
        name = str(error.response.url).rsplit("/", 1)[-1]
        what = f"{WEIGHTS_NAME} and no shards of it" if name == INDEX_NAME else name
        message = (
            f"{page} has no {what} at revision {revision!r}. Other formats, such as pickles, are not loaded; "
            "https://huggingface.co/spaces/safetensors/convert adds safetensors to a repository (refs/pr/N)"
        )
    else:
        folder = cache_root() / "hub" / repository
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        message = (
            f"there is no answer from the Hub ({reason}). On a machine that has a connection, fetch {CONFIG_NAME} and "
            f"{WEIGHTS_NAME}, or {INDEX_NAME} with all files that it lists, from {page}/tree/{revision}, and those of "
            f"{', '.join((*TOKENIZER_NAMES, *SETTINGS_NAMES))} that exist; put them into the folder {folder}, and "
            "pass that folder as the checkpoint"
        )
    raise UserError(f"cannot fetch {source}: {message}") from error
