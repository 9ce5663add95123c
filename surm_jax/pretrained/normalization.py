"""The normalisation of image pixels that a pretrained model expects, and the files that describe it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from surm_jax.errors import UserError
from surm_jax.files import read_json

PREPROCESSOR_NAME = "preprocessor_config.json"


class Normalization(NamedTuple):
    """The mean and the standard deviation of each channel. Pixels x in [0, 1] are normalised to `(x - mean) / std`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


HALF = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""The normalisation that scales pixels to [-1, 1], as AugReg checkpoints and the ViTs of transformers expect."""
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = Normalization((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def preprocessor_fields(normalization: tuple[Sequence[float], Sequence[float]], image_size: int) -> dict[str, Any]:
    """Return the content of a `preprocessor_config.json` that prepares images for a model.

    With this file, transformers resizes images bilinearly to `image_size` x `image_size` pixels and normalises them.
    """
    mean, std = normalization
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": image_size, "width": image_size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def read_preprocessor(path: Path, default: Normalization | None) -> Normalization | None:
    """Return the normalisation that a `preprocessor_config.json` describes.

    If the file contains neither a mean nor a standard deviation, `default` is returned. If the file switches
    normalisation off (`do_normalize` is false), the result has mean 0 and standard deviation 1.

    Raises:
        UserError: The file is damaged, or leaves pixels in [0, 255].
    """
    fields = read_json(path)
    if not fields.get("do_rescale", True):
        raise UserError(
            f"{path} has do_rescale = false, so that pixels stay in [0, 255]: set it to true, and rescale_factor"
        )
    mean, std = fields.get("image_mean"), fields.get("image_std")
    if not fields.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    elif mean is None and std is None:
        if default is None:
            return None
        mean, std = default
    return checked_normalization(path, mean, std, fields.get("rescale_factor", 1 / 255))


def checked_normalization(path: Path, mean: Any, std: Any, rescale_factor: Any = 1 / 255) -> Normalization:
    """Return the normalisation with a mean and a standard deviation from a file, after checking them.

    A preprocessor multiplies pixels in [0, 255] by the rescale factor f before it normalises them. For pixels x in
    [0, 1] this is `(255 f x - mean) / std`, so the result has the mean `mean / (255 f)` and the standard deviation
    `std / (255 f)`. The arguments may be of any type, because they come from a file that may be damaged.

    Raises:
        UserError: The mean or the standard deviation holds other values than finite numbers, their lengths differ, or
            a standard deviation is not positive.
    """
    try:
        scale = 255 * float(rescale_factor)
        mean, std = (tuple(float(value) / scale for value in values) for values in (mean, std))
    except (ValueError, TypeError, OverflowError, ZeroDivisionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): fetch it again") from None
    if len(mean) != len(std) or not all(map(math.isfinite, mean)) or not all(0 < s < math.inf for s in std):
        raise UserError(f"{path} is damaged: the mean of pixels is {mean} and their std {std}")
    return Normalization(mean, std)
