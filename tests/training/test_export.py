"""Test runs that start from a folder of transformers, and `--mode=export`, which writes such a folder."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from surm_jax import data
from surm_jax.errors import UserError
from surm_jax.models import Bert, BertConfig, ViT, ViTConfig
from surm_jax.peft import load_adapter, merge
from surm_jax.pretrained import from_pretrained, load, save_huggingface
from surm_jax.training.modes import evaluate_run, export_run, train_run
from surm_jax.training.parsing import saved_config
from surm_jax.training.setup import prepare
from tests.training import tiny

VIT = ViTConfig(
    **tiny.GEOMETRY, num_classes=7, activation="gelu", epsilon=1e-12, pool="token"
)  # The variant of ViT that the library transformers implements.
MEAN, STD = (0.3,), (0.2,)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model folder of transformers, with a file that says how images are normalised."""
    folder = tmp_path_factory.mktemp("hub") / "vit"
    model = load(None, lambda: ViT(VIT, rngs=nnx.Rngs(3)))
    # Add random numbers to all parameters. The zeros of a new head and the initial values of the blocks would hide
    # mistakes.
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(np.float32), state)
    save_huggingface(folder, nnx.merge(graphdef, state))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder


def config(tiny_files, source, **values):
    checkpoint = {"model.variant": "", "model.checkpoint": str(source)}
    return tiny.make_config(tiny_files, **{**checkpoint, "optim.steps": 3, **values})


@pytest.fixture(scope="module")
def run(tiny_files, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "circulant"
    train_run(config(tiny_files, source, **{"optim.learning_rate.circulant": 0.1}), folder)
    return folder


def test_the_folder_says_which_model_it_is(tiny_files, source):
    job = prepare(config(tiny_files, source), 0)
    assert job.task.model_config == dataclasses.replace(VIT, num_classes=3)
    base, stored = job.base_model(), from_pretrained(source)
    assert np.array_equal(base.blocks[0].mlp.up.kernel[...], stored.blocks[0].mlp.up.kernel[...])
    assert base.head.kernel.shape == (10, 3) and stored.head.kernel.shape == (10, 7)


def test_images_are_normalised_as_the_folder_says(tiny_files, source):
    with pytest.warns(UserWarning, match="makes images of 224 pixels, but the model reads 8 .*'height': 8, 'width': 8"):
        job = prepare(config(tiny_files, source), 0)
    raw = job.task.dataset.test[4]["image"]
    batch = next(iter(job.task.eval_batches("test")))
    np.testing.assert_allclose(batch["image"][4], (raw / 255 - MEAN[0]) / STD[0], atol=1e-5)
    train = data.train_batches(
        job.task.dataset.train,
        batch_size=40,
        image_size=8,
        augment="none",
        seed=0,
        preparation=job.task.preparation,
    )
    every = np.stack([example["image"] for example in job.task.dataset.train])
    assert np.mean(next(train)["image"]) == pytest.approx((every.mean() / 255 - MEAN[0]) / STD[0], rel=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model.variant": "B/16"}, "says itself which model it holds.*leave config.model.variant empty"),
        (
            {"model.checkpoint": "none"},
            "model.variant is empty, but config.model.checkpoint=none does not describe a model",
        ),
        ({"model.param_dtype": "bfloat16", "peft.method": "full"}, "would be trained in bfloat16"),
        ({"model.heads": 3}, "heads"),
        ({"peft.method": "bitfit", "peft.target": "mlp"}, "bitfit chooses the parameters that it trains"),
        ({"peft.method": "linear_probe", "peft.train": ()}, "nothing would be trained"),
    ],
)
def test_what_does_not_fit(tiny_files, source, values, message):
    with pytest.raises(UserError, match=message):
        prepare(config(tiny_files, source, **values), 0)


def test_a_model_of_text_is_refused(tiny_files, tmp_path):
    text = BertConfig.from_variant("tiny", vocab_size=20, width=8, heads=2, mlp_width=8, depth=1)
    save_huggingface(tmp_path / "bert", load(None, lambda: Bert(text, rngs=nnx.Rngs(0))))
    with pytest.raises(UserError, match=r"a Bert, which reads text, but config\.data\.name asks for a model of images"):
        prepare(config(tiny_files, tmp_path / "bert"), 0)


@pytest.mark.exhaustive
def test_a_base_in_bfloat16_trains_float32_adapters(tiny_files, source, tmp_path):
    values = {"model.param_dtype": "bfloat16", "model.dtype": "bfloat16", "model.remat": "block"}
    half = config(tiny_files, source, **values)
    # The gradient of jax.nn.dot_product_attention in bfloat16 needs implicit dtype promotion.
    with jax.numpy_dtype_promotion("standard"):
        train_run(half, tmp_path / "run")
    job = prepare(half, 0)
    base = job.base_model()
    assert base.blocks[0].mlp.up.kernel.dtype == "bfloat16"
    model, adapter = load_adapter(tmp_path / "run" / "adapter", base)
    _, trained, _ = nnx.split(model, adapter.trainable, ...)
    assert {variable.dtype for _, variable in nnx.to_flat_state(trained)} == {np.dtype("float32")}
    assert list(evaluate_run(tmp_path / "run", {})) == [0]


@pytest.mark.parametrize("form", ["hf", "peft"])
def test_what_is_exported_computes_the_same(run, capsys, form):
    assert export_run(run, {}, form) == [run / form]
    printed = capsys.readouterr().out
    assert f"{run / form}: logits of 8 test examples within " in printed
    difference = float(printed.split("within ")[1].split(" ")[0])
    reach = float(printed.split("reach ")[1])
    assert difference <= 1e-5 * reach and reach > 0
    # A second export replaces the files of the first.
    export_run(run, {}, form)


def test_the_exported_model_is_a_base_again(tiny_files, run):
    export_run(run, {}, "hf")
    job = prepare(config(tiny_files, run / "hf"), 0)
    assert job.task.preparation == prepare(saved_config(run), 0).task.preparation


def test_images_are_resized_and_cropped_as_the_folder_says(tiny_files, source, tmp_path):
    shutil.copytree(source, tmp_path / "vit")
    fields = {"image_mean": MEAN, "image_std": STD, "size": {"shortest_edge": 10}, "resample": 0}
    fields |= {"do_center_crop": True, "crop_size": 8, "default_to_square": False}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(fields))
    task = prepare(config(tiny_files, tmp_path / "vit"), 0).task
    raw = task.dataset.test[4]["image"]
    enlarged = np.asarray(Image.fromarray(raw[..., 0]).resize((10, 10), Image.Resampling.NEAREST))
    batch = next(iter(task.eval_batches("test")))
    np.testing.assert_allclose(batch["image"][4, ..., 0], (enlarged[1:9, 1:9] / 255 - MEAN[0]) / STD[0], atol=1e-5)


def test_images_of_other_channels_are_told(tiny_files, source, tmp_path):
    shutil.copytree(source, tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="normalises images of 3 channels, but the model reads 1"):
        prepare(config(tiny_files, tmp_path / "vit"), 0)


def test_labels_are_the_classes(run):
    export_run(run, {}, "hf")
    fields = json.loads((run / "hf" / "config.json").read_text())
    assert fields["id2label"] == {"0": "0", "1": "1", "2": "2"} and fields["model_type"] == "vit"


def test_transformers_and_peft_give_our_logits(run, source):
    reason = "compares with a PyTorch library: pip install -r requirements-peers.txt"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    peft = pytest.importorskip("peft", reason=reason)
    for form in ("hf", "peft"):
        export_run(run, {}, form)
    job = prepare(saved_config(run), 0)
    model, _ = load_adapter(run / "adapter", job.base_model())
    images = next(iter(job.task.eval_batches("test")))["image"]
    expected = np.asarray(merge(model)[0](images))
    pixels = torch.tensor(images.transpose(0, 3, 1, 2))
    whole = transformers.AutoModelForImageClassification.from_pretrained(run / "hf")
    base = transformers.AutoModelForImageClassification.from_pretrained(
        source, num_labels=3, ignore_mismatched_sizes=True
    )
    adapted = peft.PeftModel.from_pretrained(base, run / "peft")
    for theirs in (whole, adapted):
        with torch.no_grad():
            logits = theirs(pixel_values=pixels).logits.numpy()
        assert np.linalg.norm(logits - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.exhaustive
def test_a_method_without_a_counterpart_in_peft_is_refused(tiny_files, source, tmp_path):
    train_run(config(tiny_files, source, **{"peft.method": "toeplitz", "optim.steps": 1}), tmp_path / "run")
    with pytest.raises(UserError, match="merge"):
        export_run(tmp_path / "run", {}, "peft")
    assert not (tmp_path / "run" / "peft").exists()
    assert export_run(tmp_path / "run", {}, "hf")


@pytest.mark.parametrize(("form", "rank"), [("peft", 0), ("hf", 4)])
def test_a_rank_that_cannot_be(tmp_path, form, rank):
    with pytest.raises(UserError, match=f"--rank={rank} must be at least 1 and goes with --format=peft"):
        export_run(tmp_path, {}, form, rank=rank)
