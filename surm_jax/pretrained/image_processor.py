"""Read and write the settings of the image processors of transformers.

transformers 5 reads them from the entry `image_processor` of `processor_config.json` or, if there is none, from
`preprocessor_config.json`. A missing setting has the default of the processor's class. The value null switches off the
step that the setting describes.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from surm_jax.errors import UserError, require_one_of
from surm_jax.files import read_json
from surm_jax.preparation import Normalization, PerChannel, Preparation

PREPROCESSOR_NAME = "preprocessor_config.json"
PROCESSOR_NAME = "processor_config.json"

HALF = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""The normalisation that scales pixels to [-1, 1], as AugReg checkpoints and the ViTs of transformers expect."""
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = Normalization((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

_STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
_SQUARE = {"height": 224, "width": 224}
_ROUND_CLIP = {
    **_STEPS,
    "do_center_crop": True,
    "do_convert_rgb": True,
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "crop_size": _SQUARE,
    "resample": Image.Resampling.BICUBIC,
    "image_mean": CLIP.mean,
    "image_std": CLIP.std,
}
PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "ViTImageProcessor": {
        **_STEPS,
        "size": _SQUARE,
        "resample": Image.Resampling.BILINEAR,
        "image_mean": HALF.mean,
        "image_std": HALF.std,
    },
    "DeiTImageProcessor": {
        **_STEPS,
        "do_center_crop": True,
        "size": {"height": 256, "width": 256},
        "crop_size": _SQUARE,
        "resample": Image.Resampling.BICUBIC,
        "image_mean": HALF.mean,
        "image_std": HALF.std,
    },
    "CLIPImageProcessor": _ROUND_CLIP,
    "BitImageProcessor": _ROUND_CLIP,
}
"""The defaults of the classes of image processors that are known, by the name of the class."""

_SIZES = (
    {"height", "width"},
    {"shortest_edge"},
    {"shortest_edge", "longest_edge"},
    {"max_height", "max_width"},
)
_DO = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb")
_REFUSED = ("offset", "rescale_offset", "use_square_size")


def processor_file(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """Return the settings of the image processor in a folder and their place for error messages, or None without any.

    Raises:
        UserError: A file is damaged.
    """
    nested, flat = folder / PROCESSOR_NAME, folder / PREPROCESSOR_NAME
    if nested.is_file() and "image_processor" in (content := read_json(nested)):
        fields = content["image_processor"]
        if not isinstance(fields, dict):
            raise UserError(f"{nested} is damaged: its image_processor is {fields!r}, but must be a JSON object")
        return f"the image_processor of {nested}", fields
    return (str(flat), read_json(flat)) if flat.is_file() else None


def read_processor(origin: str, fields: Mapping[str, Any], default_type: str) -> Preparation:
    """Convert the settings of an image processor to a `Preparation` of images.

    Args:
        origin: The place of the settings, for error messages.
        fields: The settings.
        default_type: The class of the processor, a key of `PROCESSORS`, for settings that do not name it.

    Raises:
        UserError: The class of the processor is unknown, or a setting is damaged or cannot be followed.
    """
    old = fields.get("feature_extractor_type")
    named = fields.get("image_processor_type") or (
        old.replace("FeatureExtractor", "ImageProcessor") if isinstance(old, str) else default_type
    )
    kind = str(named).removesuffix("Fast")
    require_one_of(f"{origin}: image_processor_type", kind, PROCESSORS)
    settings = {"default_to_square": True, **PROCESSORS[kind], **fields}
    for name in settings:
        if ((name.startswith("do_") and name not in _DO) or name in _REFUSED) and settings[name]:
            raise UserError(f"{origin} has {name} = {settings[name]!r}, which is not supported: prepare images without")
    switched = {name: settings.get(name) for name in (*_DO, "default_to_square")}
    for name, value in switched.items():
        if value is not None and not isinstance(value, bool):
            raise UserError(f"{origin} is damaged: {name} is {value!r}, but must be true or false")
    size = crop = None
    if switched["do_resize"]:
        size = _size(origin, "size", settings["size"], bool(switched["default_to_square"]))
    if switched["do_center_crop"]:
        sides = _size(origin, "crop_size", settings.get("crop_size"), True)
        if "height" not in sides:
            raise UserError(f"{origin} has crop_size = {settings['crop_size']!r}, but a crop has height and width")
        crop = sides["height"], sides["width"]
    mean, std = (settings["image_mean"], settings["image_std"]) if switched["do_normalize"] else (0.0, 1.0)
    factor = settings["rescale_factor"] if switched["do_rescale"] else 1.0
    preparation = Preparation(
        rgb=bool(switched["do_convert_rgb"]),
        size=size,
        resample=_resampling(origin, settings["resample"]) if size else Image.Resampling.BILINEAR,
        crop_size=crop,
        normalization=_normalization(origin, mean, std, factor),
    )
    if (output := preparation.output) and output[0] != output[1]:
        raise UserError(f"{origin} asks for images of {output[0]} x {output[1]} pixels, but our models read squares")
    return preparation


def write_processor(preparation: Preparation, channels: int) -> dict[str, Any]:
    """Return the content of a `preprocessor_config.json` that prepares images in the given way.

    The file names every setting, so that they hold for any class of processor.

    Args:
        preparation: How images are prepared.
        channels: The number of channels of the model. A mean for all channels is written once for each channel.
    """
    mean, std = (
        list(values) if isinstance(values, tuple) else [values] * channels for values in preparation.normalization
    )
    size, crop = preparation.size, preparation.crop_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": preparation.rgb,
        "do_resize": size is not None,
        **({} if size is None else {"size": dict(size), "resample": int(preparation.resample)}),
        "do_center_crop": crop is not None,
        **({} if crop is None else {"crop_size": dict(zip(("height", "width"), crop, strict=True))}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def _size(origin: str, name: str, value: Any, square: bool) -> dict[str, int]:
    """Convert a size in a file, which may be a number or a list of two, to one with the keys of `Preparation.size`."""
    size = value
    if isinstance(value, int):
        size = {"height": value, "width": value} if square else {"shortest_edge": value}
    elif isinstance(value, list) and len(value) == 2:
        size = dict(zip(("height", "width"), value, strict=True))
    if not isinstance(size, dict) or set(size) not in _SIZES:
        raise UserError(
            f"{origin} has {name} = {value!r}, but must have a number, or one of the sets of keys"
            f" {', '.join('/'.join(sorted(keys)) for keys in _SIZES)}"
        )
    for side in size.values():
        if not isinstance(side, int) or isinstance(side, bool) or side < 1:
            raise UserError(f"{origin} has {name} = {value!r}, but sizes are positive whole numbers")
    return size


def _resampling(origin: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value not in list(Image.Resampling):
        names = ", ".join(f"{each.value} ({each.name.lower()})" for each in Image.Resampling)
        raise UserError(f"{origin} has resample = {value!r}, but the filters are {names}")
    return value


def _normalization(origin: str, mean: Any, std: Any, rescale_factor: Any) -> Normalization:
    """Check the mean and the standard deviation in a file, and return the normalisation of pixels in [0, 1].

    A processor multiplies pixels in [0, 255] by the rescale factor f before it normalises them. For pixels x in [0, 1]
    this is `(255 f x - mean) / std`, so the result has the mean `mean / (255 f)` and the standard deviation `std / (255
    f)`.

    Raises:
        UserError: The mean or the standard deviation holds other values than finite numbers, their lengths differ, or a
            standard deviation is not positive.
    """

    def over(values: Any) -> PerChannel:
        if isinstance(values, int | float):
            return float(values) / scale
        return tuple(float(value) / scale for value in values)

    try:
        scale = 255 * float(rescale_factor)
        mean, std = over(mean), over(std)
    except (ValueError, TypeError, OverflowError, ZeroDivisionError) as error:
        raise UserError(f"{origin} is damaged ({type(error).__name__}: {error}): fetch it again") from None
    means, stds = (values if isinstance(values, tuple) else (values,) for values in (mean, std))
    same = len(means) == len(stds) or not (isinstance(mean, tuple) and isinstance(std, tuple))
    if not same or not all(map(math.isfinite, means)) or not all(0 < each < math.inf for each in stds):
        raise UserError(f"{origin} is damaged: the mean of pixels is {mean} and their std {std}")
    return Normalization(mean, std)
