"""The normalisation of pixels that a checkpoint expects. It differs between sources."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from surm_jax.errors import UserError
from surm_jax.files import read_json

PREPROCESSOR_NAME = "preprocessor_config.json"


class Normalization(NamedTuple):
    """Mean and standard deviation by channel: `(x - mean) / std` for pixels x in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


HALF = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Scaling to [-1, 1], which AugReg and the ViTs of transformers expect."""
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = Normalization((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def preprocessor_fields(normalization: tuple[Sequence[float], Sequence[float]], image_size: int) -> dict[str, Any]:
    """Return the `preprocessor_config.json` for images that are resized bilinearly and normalised."""
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
    """Return the normalisation in a `preprocessor_config.json`, or the default if it gives neither mean nor std.

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
    """Return the normalisation that equals `(255 f x - mean) / std` for pixels x in [0, 1] and the rescale factor f.

    Raises:
        UserError: The mean and the standard deviation are not finite numbers, have different lengths, or a standard
            deviation is not positive. The arguments may be of any type.
    """
    try:
        scale = 255 * float(rescale_factor)
        mean, std = (tuple(float(value) / scale for value in values) for values in (mean, std))
    except (ValueError, TypeError, OverflowError, ZeroDivisionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): fetch it again") from None
    if len(mean) != len(std) or not all(map(math.isfinite, mean)) or not all(0 < s < math.inf for s in std):
        raise UserError(f"{path} is damaged: the mean of pixels is {mean} and their std {std}")
    return Normalization(mean, std)
