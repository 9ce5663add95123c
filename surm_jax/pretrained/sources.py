"""Which file a checkpoint's name stands for."""

from pathlib import Path

from surm_jax.errors import UserError, did_you_mean
from surm_jax.pretrained.augreg import AUGREG_URLS
from surm_jax.pretrained.download import download

DIGITS_WEIGHTS = Path(__file__).parent / "weights" / "vit_digits.safetensors"

NAMES = ("none", "augreg", "digits")


def locate(checkpoint: str, variant: str) -> Path | None:
    """Returns the local file of a checkpoint, downloading it where needed.

    Args:
        checkpoint: "none" (start from the initialisers), "augreg" (the official ImageNet-21k checkpoint of the
            variant), "digits" (the small ViT that comes with this package), an http(s) URL, or a path.
        variant: the model's name in `surm_jax.models.vit.VARIANTS`.

    Returns:
        The file, or `None` for "none".

    Raises:
        UserError: no such file, no official checkpoint of that variant, or a download that fails; the message says what
            there is, or which file to put where.

    >>> locate("none", "B/16") is None
    True
    """
    if checkpoint == "none":
        return None
    if checkpoint == "augreg":
        if variant not in AUGREG_URLS:
            raise UserError(
                f"there is no official AugReg checkpoint of ViT {variant!r}; there is one of {sorted(AUGREG_URLS)}"
            )
        return download(AUGREG_URLS[variant])
    if checkpoint == "digits":
        if not DIGITS_WEIGHTS.is_file():
            raise UserError(f"the weights of the digits ViT are missing from this installation: {DIGITS_WEIGHTS}")
        return DIGITS_WEIGHTS
    if checkpoint.startswith(("http://", "https://")):
        return download(checkpoint)
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        raise UserError(f"there is no checkpoint {checkpoint!r}: {_what_is_wrong(path, checkpoint)}")
    return path


def _what_is_wrong(path: Path, checkpoint: str) -> str:
    """Says why a path is not a file, with the names that were perhaps meant."""
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.is_file())
        return f"it is a folder{', with the files ' + ', '.join(files[:8]) if files else ', and empty'}"
    if not path.parent.is_dir():
        return f"not even the folder {path.parent} exists"
    siblings = [file.name for file in path.parent.iterdir() if file.is_file()]
    known = NAMES if path.name == checkpoint else ()
    return (
        f"it is no file in {path.parent.resolve()}, and none of {', '.join(map(repr, NAMES))} or an http(s) URL"
        f"{did_you_mean(path.name, [*known, *siblings])}"
    )
