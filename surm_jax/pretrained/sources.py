"""Find the local file or folder that the name of a checkpoint stands for."""

import re
from pathlib import Path

from surm_jax.errors import UserError, did_you_mean
from surm_jax.pretrained import hub
from surm_jax.pretrained.augreg import AUGREG_URLS
from surm_jax.pretrained.download import download
from surm_jax.pretrained.hf.folder import CONFIG_NAME

DIGITS_WEIGHTS = Path(__file__).parent / "weights" / "vit_digits.safetensors"

NAMES = ("none", "augreg", "digits")


def locate(checkpoint: str, variant: str | None = None) -> Path | None:
    """Download a checkpoint if needed, and return the path of its local file or folder.

    Args:
        checkpoint: "none" (no checkpoint, so all parameters are initialised), "augreg" (the official ImageNet-21k
            checkpoint of the variant), "digits" (the small ViT in this package), "hf://owner/name" or
            "hf://owner/name@revision" (a model of the Hugging Face Hub), an http(s) URL, or the path of a file or of a
            folder of transformers.
        variant: The name in `ViTConfig.VARIANTS` of the model for "augreg". Other checkpoints do not need it.

    Returns:
        The path of the file or folder, or `None` for "none".

    Raises:
        UserError: There is no such file, there is no official checkpoint of the variant, or the download fails. The
            message lists names that exist, or says which file the user can copy to which path.

    >>> locate("none") is None
    True
    """
    if checkpoint == "none":
        return None
    if checkpoint == "augreg":
        if variant is None or variant not in AUGREG_URLS:
            wrong = (
                f"there is no official AugReg checkpoint of ViT {variant!r}" if variant else "augreg needs a variant"
            )
            raise UserError(f"{wrong}; the variants are {sorted(AUGREG_URLS)}")
        return download(AUGREG_URLS[variant])
    if checkpoint == "digits":
        if not DIGITS_WEIGHTS.is_file():
            raise UserError(f"the weights of the digits ViT are missing from this installation: {DIGITS_WEIGHTS}")
        return DIGITS_WEIGHTS
    if checkpoint.startswith(("http://", "https://")):
        return download(checkpoint)
    if checkpoint.startswith(hub.PREFIX):
        return hub.fetch(checkpoint)
    try:
        path = Path(checkpoint).expanduser()
    except RuntimeError:
        raise UserError(f"there is no checkpoint {checkpoint!r}: no user of this machine has that name") from None
    if not path.is_file() and not (path / CONFIG_NAME).is_file():
        raise UserError(f"there is no checkpoint {checkpoint!r}: {_what_is_wrong(path, checkpoint)}")
    return path


def is_folder(checkpoint: str) -> bool:
    """Return whether the name of a checkpoint stands for a folder of transformers, without downloading it.

    The names in `NAMES`, such as "digits", never do, even if there is a folder of that name.

    >>> is_folder("hf://google/vit-base-patch16-224"), is_folder("digits")
    (True, False)
    """
    if checkpoint in NAMES:
        return False
    return checkpoint.startswith(hub.PREFIX) or Path(checkpoint).expanduser().is_dir()


def is_path(checkpoint: str) -> bool:
    """Return whether the name of a checkpoint stands for a local file or folder.

    >>> is_path("runs/vit/hf"), is_path("digits"), is_path("hf://google/vit-base-patch16-224")
    (True, False, False)
    """
    return checkpoint not in NAMES and "://" not in checkpoint


def published_name(checkpoint: str) -> str:
    """Return the name of a checkpoint on the Hugging Face Hub, or an empty text if it is not from there.

    This name is written into files for others, to whom a local path would be of no use.

    >>> published_name("hf://google/vit-base-patch16-224@main"), published_name("/home/me/vit")
    ('google/vit-base-patch16-224', '')
    """
    return checkpoint.removeprefix(hub.PREFIX).partition("@")[0] if checkpoint.startswith(hub.PREFIX) else ""


def weight_files(checkpoint: Path | None) -> tuple[Path, ...]:
    """Return the files that hold the weights of a checkpoint and describe its model.

    Args:
        checkpoint: The result of `locate`.
    """
    if checkpoint is None:
        return ()
    if checkpoint.is_file():
        return (checkpoint,)
    return tuple(sorted(path for path in checkpoint.iterdir() if path.suffix in (".json", ".safetensors")))


def _what_is_wrong(path: Path, checkpoint: str) -> str:
    """Return an error message for a path that is neither a file nor a folder of transformers, with similar names."""
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.is_file())
        held = f"it holds {', '.join(files[:8])}" if files else "it is empty"
        return f"the folder holds no {CONFIG_NAME}, which a folder of transformers needs: {held}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./+-]+)?", checkpoint) and not checkpoint.startswith("."):
        return f"there is no such path; a model of the Hugging Face Hub is named {hub.PREFIX + checkpoint!r}"
    if not path.parent.is_dir():
        return f"not even the folder {path.parent} exists"
    siblings = [file.name for file in path.parent.iterdir()]
    known = NAMES if path.name == checkpoint else ()
    return (
        f"it is no file in {path.parent.resolve()}, and none of {', '.join(map(repr, NAMES))}, hf://owner/name or an "
        f"http(s) URL{did_you_mean(path.name, [*known, *siblings])}"
    )
