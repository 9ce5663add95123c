"""Compare the preparation of images with the image processors of transformers, which use Pillow here."""

import io
import itertools
import json
import warnings

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from surm_jax.data import eval_image
from surm_jax.errors import UserError
from surm_jax.preparation import Normalization, Preparation
from surm_jax.pretrained import image_normalization, image_preparation
from surm_jax.pretrained.hf import ARCHITECTURES
from surm_jax.pretrained.image_processor import CLIP, HALF, IMAGENET, PROCESSORS, read_processor, write_processor


def write(folder, model_type="vit", nested=False, **settings):
    """Write the settings of an image processor in one of the two possible files, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if settings and nested:
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    elif settings:
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def folder(tmp_path):
    return lambda *args, **settings: write(tmp_path, *args, **settings)


@pytest.fixture(scope="module")
def peer():
    """Return a function that loads the processor of a folder with transformers."""
    reason = "compares with a PyTorch library: pip install -r requirements-peers.txt"
    transformers = pytest.importorskip("transformers", reason=reason)
    return lambda folder: transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")


@pytest.fixture(scope="module")
def photographs(request):
    """Photographs of several shapes, as uint8 arrays, or smooth random images without the data folder."""
    path = request.config.rootpath.parent / "shared" / "data" / "vtab" / "caltech101_test.npz"
    if not path.is_file():
        rng = np.random.default_rng(0)
        small = [rng.integers(0, 256, (9, 7, 3), np.uint8) for _ in range(4)]
        return [np.asarray(Image.fromarray(each).resize((60 + 13 * i, 70))) for i, each in enumerate(small)]
    with np.load(path) as arrays:
        ends = itertools.pairwise(arrays["offsets"])
        jpegs = [arrays["jpeg"][start:end].tobytes() for start, end in itertools.islice(ends, 0, None, 50)]
    return [np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in jpegs]


def test_the_folder_says_it(folder):
    given = image_normalization(folder("clip", image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 3]))
    assert given == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    weights = folder() / "model.safetensors"  # The path of a single file beside its config.json.
    save_file({}, weights)
    assert image_normalization(weights) == given


def test_the_nested_settings_come_first(folder):
    folder(image_mean=0.1)
    assert image_normalization(folder(nested=True, image_mean=0.2, image_std=0.5)) == (0.2, 0.5)
    (folder() / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert image_normalization(folder()).mean == 0.1


@pytest.mark.parametrize(("model_type", "expected"), [("vit", HALF), ("deit", IMAGENET), ("clip", CLIP)])
def test_without_settings_it_is_that_of_the_kind_of_model(folder, model_type, expected):
    assert image_preparation(folder(model_type)) == Preparation(normalization=expected)


def test_every_model_of_images_has_one():
    for architecture in ARCHITECTURES.values():
        assert (architecture.normalization is not None) == (architecture.model.reads == "images")
        assert architecture.processor in PROCESSORS


def test_other_formats_have_none(tmp_path, folder):
    assert image_preparation(None) == Preparation()
    folder("clip")
    np.savez(tmp_path / "augreg.npz", cls=np.zeros(1))
    assert image_preparation(tmp_path / "augreg.npz") == Preparation()


def test_the_constants_are_those_of_transformers(peer):
    from transformers import image_utils as constants

    assert (tuple(constants.OPENAI_CLIP_MEAN), tuple(constants.OPENAI_CLIP_STD)) == CLIP
    assert (tuple(constants.IMAGENET_DEFAULT_MEAN), tuple(constants.IMAGENET_DEFAULT_STD)) == IMAGENET
    assert (tuple(constants.IMAGENET_STANDARD_MEAN), tuple(constants.IMAGENET_STANDARD_STD)) == HALF


def pixels(processor, image):
    """Return an image, (height, width, channels), as transformers prepares it."""
    theirs = processor(Image.fromarray(image.squeeze()), return_tensors="np")["pixel_values"][0]
    return np.moveaxis(theirs, 0, -1)


def require_equal(ours, theirs, preparation):
    """Check that two images differ by at most one grey level of 255, and on average by at most a tenth of it."""
    level = 1 / (255 * np.min(preparation.normalization.std))
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1.01 * level + 1e-5 * np.abs(theirs).max()
    assert np.abs(ours - theirs).mean() <= 0.1 * level


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("vit", {"image_mean": 0.5, "image_std": 0.25}),
        ("vit", {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]}),
        ("vit", {"do_rescale": False, "image_mean": [127] * 3, "image_std": [64] * 3}),
        ("vit", {"do_normalize": False, "rescale_factor": 0.01}),
        ("vit", {"do_normalize": False, "do_rescale": False}),
        ("vit", {"size": 64, "resample": 1, "do_rescale": None}),
        ("deit", {"do_rescale": True}),
        ("clip", {"image_processor_type": "CLIPImageProcessor"}),
        ("dinov2", {"size": {"shortest_edge": 80}, "crop_size": 64, "image_mean": IMAGENET.mean}),
        ("clip", {"size": {"shortest_edge": 80, "longest_edge": 90}, "crop_size": [100, 100]}),
        ("vit", {"do_resize": False, "do_center_crop": True, "crop_size": 97, "feature_extractor_type": "X"}),
    ],
)
def test_pixels_are_those_of_transformers(folder, peer, photographs, model_type, settings, nested):
    if settings.get("feature_extractor_type"):
        settings = settings | {"feature_extractor_type": "CLIPFeatureExtractor"}
    where = folder(model_type, nested=nested, **settings)
    processor, preparation = peer(where), image_preparation(where)
    for image in photographs[:4]:
        theirs = pixels(processor, image)
        require_equal(eval_image(image, theirs.shape[0], preparation), theirs, preparation)


def test_grey_images_become_colour_if_the_folder_says_so(folder, peer):
    where = folder("clip", size={"height": 9, "width": 9}, do_center_crop=False)
    grey = np.random.default_rng(0).integers(0, 256, (9, 9, 1), np.uint8)
    require_equal(eval_image(grey, 9, image_preparation(where)), pixels(peer(where), grey), image_preparation(where))
    clear = np.random.default_rng(0).integers(0, 256, (9, 9, 4), np.uint8)
    require_equal(eval_image(clear, 9, image_preparation(where)), pixels(peer(where), clear), image_preparation(where))


def random_settings(rng):
    """Return random settings, many of them meaningless. Each is missing with probability 1/2."""

    def pick(*values):
        return values[rng.integers(len(values))]

    def side():
        return int(rng.integers(1, 90))

    n = side()
    square = {"height": n, "width": n}
    edges = {"shortest_edge": n, "longest_edge": side()}
    every = {
        "image_processor_type": pick(*PROCESSORS, "ViTImageProcessorFast", "SiglipImageProcessor", "Nothing", 3),
        "feature_extractor_type": pick("CLIPFeatureExtractor", "ViTFeatureExtractor", "DeiTFeatureExtractor"),
        "do_resize": pick(True, True, False, None),
        "size": pick(n, square, {"height": n, "width": side()}, {"shortest_edge": n}, edges, [n, n], {}, "a", None, 0,
                     {"longest_edge": n}, {"max_height": n, "max_width": n}, {**square, "shortest_edge": n}, -n, 2.5),
        "default_to_square": pick(True, False, None),
        "resample": pick(0, 1, 2, 3, 4, 5, 9, "bicubic", None),
        "do_center_crop": pick(True, True, False, None),
        "crop_size": pick(n, square, {"height": side(), "width": n}, [n, n], {"shortest_edge": n}, None, 0),
        "do_rescale": pick(True, False, None),
        "rescale_factor": pick(1 / 255, 1 / 127.5, 0.01, 1, None, 0, "a"),
        "do_normalize": pick(True, False, None),
        "image_mean": pick(0.5, [0.1, 0.2, 0.3], (0, 0, 0), None, [0.5], "a"),
        "image_std": pick(0.5, 1, [0.1, 0.2, 0.3], None, [0.5], 0),
        "do_convert_rgb": pick(True, False, None),
        "do_pad": pick(False, False, True),
        "unknown": 7,
    }  # fmt: skip
    return {name: value for name, value in every.items() if rng.integers(2)}


def compare(folder, settings, model_type, peer, image):
    """Compare our preparation of an image with that of transformers, and return what ours did.

    Returns:
        "equal", "refused", or "theirs refused" if only transformers refuses the settings.
    """
    channels = image.shape[-1]
    try:
        where = write(folder, model_type, nested=bool(settings.get("do_convert_rgb")), **settings)
        preparation = image_preparation(where)
        side = preparation.output[0] if preparation.output else image.shape[0]
        ours = eval_image(image, side, preparation)
        for values in preparation.normalization:
            if isinstance(values, tuple) and len(values) != preparation.channels(channels):
                return "refused"  # `ImageClassification.build` compares with the model's channels.
    except UserError:
        return "refused"
    try:
        theirs = pixels(peer(where), image)
    except Exception:
        return "theirs refused"
    require_equal(ours, theirs, preparation)
    return "equal"


@pytest.mark.parametrize("count", [40, pytest.param(600, marks=pytest.mark.exhaustive)])
def test_random_settings_give_the_pixels_of_transformers_or_are_refused(tmp_path, peer, photographs, count):
    rng = np.random.default_rng(count)
    seen = {"equal": 0, "refused": 0, "theirs refused": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index in range(count):
            settings = random_settings(rng) or {"do_resize": True}
            image = photographs[rng.integers(len(photographs))]
            image = image[: rng.integers(1, 200), : rng.integers(1, 200)]
            image = image[..., :1] if rng.integers(4) == 0 else image
            if settings.get("do_resize") is False and rng.integers(2):
                image = image[: min(image.shape[:2]), : min(image.shape[:2])]
            model_type = ("vit", "deit", "clip", "dinov2")[rng.integers(4)]
            try:
                outcome = compare(tmp_path / str(index), settings, model_type, peer, image)
            except AssertionError as error:
                raise AssertionError(f"{model_type} {settings} {image.shape}: {error}") from error
            seen[outcome] += 1
    assert seen["equal"] >= count / 10 and seen["refused"] >= count / 10, seen
    assert seen["theirs refused"] <= count / 100, seen


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_mean": [0.5], "image_std": [0.5, 0.5]}, "is damaged: the mean of pixels"),
        ({"image_mean": [0.5], "image_std": [0.0]}, "is damaged"),
        ({"image_mean": "a", "image_std": [1.0]}, "is damaged"),
        ({"image_mean": [float("nan")], "image_std": [1.0]}, "is damaged"),
        ({"image_mean": [10**400], "image_std": [1.0]}, "is damaged"),
        ({"rescale_factor": 0}, "is damaged"),
        ({"rescale_factor": -1}, "is damaged"),
        ({"rescale_factor": "a"}, "is damaged"),
        ({"do_resize": "yes"}, "do_resize is 'yes', but must be true or false"),
        ({"size": {"longest_edge": 9}}, "has size = .* one of the sets of keys"),
        ({"size": {"height": 9, "width": 8}}, "asks for images of 9 x 8 pixels, but our models read squares"),
        ({"size": -1}, "sizes are positive whole numbers"),
        ({"do_center_crop": True}, "has crop_size = None"),
        ({"resample": 9}, r"has resample = 9, but the filters are 0 \(nearest\)"),
        ({"do_pad": True}, "has do_pad = True, which is not supported"),
        ({"offset": True}, "has offset = True, which is not supported"),
        ({"image_processor_type": "SamImageProcessor"}, "image_processor_type must be one of .*'SamImageProcessor'"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_what_cannot_be_followed_is_refused_by_name(folder, settings, message, nested):
    with pytest.raises(UserError, match=rf"p\w+_config\.json.*{message}"):
        image_preparation(folder("vit", nested=nested, **settings))


def test_images_that_do_not_become_square_are_told(folder):
    preparation = image_preparation(folder("vit", size={"shortest_edge": 8}))
    assert eval_image(np.zeros((9, 9, 3), np.uint8), 8, preparation).shape == (8, 8, 3)
    with pytest.raises(UserError, match=r"an image of 9 x 18 pixels becomes 8 x 16 .* but the model reads 8 x 8"):
        eval_image(np.zeros((9, 18, 3), np.uint8), 8, preparation)


@pytest.mark.parametrize("kind", PROCESSORS)
def test_what_is_written_is_read_again(kind):
    read = read_processor("here", {"resample": 1}, kind)
    assert read_processor("there", json.loads(json.dumps(write_processor(read, 3))), "ViTImageProcessor") == read
    grey = Preparation(size=None, normalization=Normalization(0.1, 0.2))
    again = read_processor("there", write_processor(grey, 1), kind)
    assert (again.size, again.normalization) == (None, ((0.1,), (0.2,)))
