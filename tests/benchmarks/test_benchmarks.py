"""Check that every benchmark runs and writes correct rows, at sizes so small that the times mean nothing."""

import json
import math

import pytest

from tests.training.several import run_module

# Every test starts a process.
pytestmark = pytest.mark.exhaustive


@pytest.fixture
def run(tmp_path_factory):
    """A function from the name of a benchmark and its arguments to how its process ended."""
    folder = tmp_path_factory.mktemp("printed")
    return lambda module, *arguments: run_module(folder, f"benchmarks.{module}", *arguments)


def test_structured(run, tmp_path):
    out = tmp_path / "rows.json"
    done = run("structured", f"--out={out}", "--families=Circulant", "--sizes=16x8", "--rounds=1")
    assert done.status == 0, done.err
    rows = json.loads(out.read_text())
    assert [(row["family"], row["execution"]) for row in rows] == [
        ("frozen", "frozen"),
        *(("LowRank", execution) for execution in ("auto", "fft", "dense", "fused")),
        *(("Circulant", execution) for execution in ("auto", "fft", "dense", "fused")),
    ]
    lora = rows[2]
    for row in rows:
        assert (row["width"], row["tokens"], row["dtype"]) == (16, 8, "float32")
        assert row["ms"] > 0 and row["temp_bytes"] >= 0
        assert math.isclose(row["ratio_to_frozen"], row["ms"] / rows[0]["ms"])
        assert math.isclose(row["ratio_to_lora"], row["ms"] / lora["ms"])
        # The memory is at least that of the arguments x, W and dy, and of the results y and dx.
        assert row["peak_bytes"] >= 4 * (8 * 16 + 16 * 16 + 8 * 16 + 2 * 8 * 16)
    assert "ratio_to_lora" in done.out and "width 16, 8 tokens, float32" in done.out


def test_structured_replaces_only_the_rows_of_its_sizes(run, tmp_path):
    out = tmp_path / "rows.json"
    old = [{"width": 16, "tokens": tokens, "dtype": "float32", "family": "frozen", "ms": -1} for tokens in (4, 8, 2)]
    out.write_text(json.dumps(old))
    done = run("structured", f"--out={out}", "--families=Circulant", "--sizes=16x8", "--rounds=1")
    assert done.status == 0, done.err
    rows = json.loads(out.read_text())
    assert rows[0] == old[0] and rows[-1] == old[2]
    assert len(rows) == 2 + 9
    assert all(row["tokens"] == 8 and row["ms"] > 0 for row in rows[1:-1])


def test_step(run, tmp_path):
    out = tmp_path / "rows.json"
    options = ("--variant=digits", "--batch=2", "--rounds=1", "--devices=1,2")
    done = run("step", f"--out={out}", "--methods=bitfit,full", *options)
    assert done.status == 0, done.err
    found = json.loads(out.read_text())
    assert [row["devices"] for row in found] == [1] * 4 + [2] * 4
    rows = {row["method"]: row for row in found[:4]}
    assert [*rows] == [row["method"] for row in found[4:]] == ["frozen", "lora", "bitfit", "full"]
    assert rows["full"]["parameters"] > rows["lora"]["parameters"] > rows["frozen"]["parameters"] == 0
    # The state of AdamW is two float32 moments for each trained parameter, and a counter.
    for row in found:
        assert row["ms"] > 0 and row["peak_bytes"] > 0
        assert row["optimizer_bytes"] == (8 * row["parameters"] + 4 if row["parameters"] else 0)
        assert math.isclose(row["examples_per_s"], 2 / (row["ms"] / 1e3))


@pytest.mark.parametrize(("devices", "message"), [("1,3", "does not divide over 3 devices"), ("two", "--devices=two")])
def test_devices_that_cannot_be(run, devices, message):
    done = run("step", "--variant=digits", "--batch=4", f"--devices={devices}")
    assert done.status != 0 and message in done.err


def test_accelerator(run, tmp_path):
    done = run("accelerator", f"--folder={tmp_path}", "--tiny", "--minutes=5")
    assert done.status == 0, done.err
    parts = [f"{part}_{dtype}" for part in ("layer_16x8", "vit", "bert") for dtype in ("float32", "bfloat16")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["choice.json", *(f"{part}.{ending}" for part in parts for ending in ("json", "txt"))]
    )
    for part in parts:
        rows = json.loads((tmp_path / f"{part}.json").read_text())
        assert all(row["ms"] > 0 and row["dtype"] == part.rsplit("_", 1)[1] for row in rows) and len(rows) > 1


def test_accelerator_names_what_the_time_did_not_allow(run, tmp_path):
    done = run("accelerator", f"--folder={tmp_path}", "--minutes=0")
    assert done.status == 1
    assert "not measured within 0 minutes, or failed: layer_768x6304_float32, layer_768x6304_bfloat16" in done.err


def test_start(run, tmp_path):
    done = run("start", f"--out={tmp_path / 'rows.json'}", "--rounds=2")
    assert done.status == 0, done.err
    seconds = {row["until"]: row["seconds"] for row in json.loads((tmp_path / "rows.json").read_text())}
    assert 0 < seconds["set up"] < seconds["first step"] and seconds["set up, cold"] < seconds["first step, cold"]
    assert all(seconds[f"import {module}"] > 0 for module in ("flax.nnx", "surm_jax", "surm_jax.__main__"))


def test_bank(run, tmp_path):
    out = tmp_path / "rows.json"
    options = ("--variant=digits", "--image_size=8", "--batch=4", "--rounds=1")
    done = run("bank", f"--out={out}", "--adapters=1,4", *options)
    assert done.status == 0, done.err
    rows = json.loads(out.read_text())
    assert [row["adapters"] for row in rows] == [1, 4]
    assert all(row["bank_ms"] > 0 and row["loop_ms"] > 0 and row["one_ms"] > 0 for row in rows)
    done = run("bank", "--adapters=3", *options)
    assert done.status != 0 and "--adapters=3 does not divide --batch=4" in done.out + done.err


def test_generation(run, tmp_path):
    out = tmp_path / "rows.json"
    sizes = ("--adapters=3", "--width=64", "--depth=1", "--vocabulary=50", "--prompt=5", "--new=4", "--rounds=1")
    done = run("generation", f"--out={out}", *sizes)
    assert done.status == 0, done.err
    rows = {row["way"]: row for row in json.loads(out.read_text())}
    assert [*rows] == ["base", "one", "bank", "switch"]
    for row in rows.values():
        assert math.isclose(row["tokens_per_s"], 3 * 4 / (row["ms"] / 1e3))
        assert math.isclose(row["to_one"], row["ms"] / rows["one"]["ms"])


def test_input(run, tmp_path):
    out = tmp_path / "rows.json"
    done = run("input", f"--out={out}", "--set=digits_5to9", "--variant=digits", "--batch=2", "--steps=2")
    assert done.status == 0, done.err
    (row,) = json.loads(out.read_text())
    assert (row["model"], row["set"], row["image_size"], row["batch"]) == ("ViT-digits", "digits_5to9", 8, 2)
    assert 0 <= row["wait_ms"] < row["ms"] and row["images_per_s"] > 0
    assert math.isclose(row["share_waiting"], row["wait_ms"] / row["ms"])
    assert math.isclose(row["images_needed_per_s"], 2e3 / row["one_batch_ms"])
    done = run("input", "--set=cifar11", f"--data={tmp_path}")
    assert done.status != 0 and "cifar11" in done.out + done.err and "Traceback" not in done.err


def test_depth(run, tmp_path):
    out = tmp_path / "rows.json"
    done = run("depth", f"--out={out}", "--depths=2,3", "--width=4")
    assert done.status == 0, done.err
    rows = {(row["depth"], row["layers"]): row for row in json.loads(out.read_text())}
    assert [*rows] == [(2, "looped"), (2, "scanned"), (3, "looped"), (3, "scanned")]
    assert all(row["trace_s"] > 0 and row["compile_s"] > 0 and row["temp_bytes"] > 0 for row in rows.values())
    assert rows[3, "looped"]["instructions"] > rows[2, "looped"]["instructions"]
    assert rows[3, "scanned"]["instructions"] == rows[2, "scanned"]["instructions"]
    # The method `adapter_drop` leaves the first five blocks without an adapter, so it needs a model of at least six
    # blocks. So the benchmark must not use a model with fewer blocks to warm up.
    done = run("depth", "--depths=6", "--width=4", "--method=adapter_drop")
    assert done.status == 0, done.err


def test_peers(run, tmp_path):
    for name in ("torch", "peft"):
        pytest.importorskip(name, reason="compares with PyTorch: pip install -r requirements-peers.txt")
    out = tmp_path / "rows.json"
    done = run("peers", f"--out={out}", "--width=32", "--tokens=8", "--rounds=1")
    assert done.status == 0, done.err
    rows = {row["layer"]: row for row in json.loads(out.read_text())}
    peers = {"torch frozen", "torch lora", "torch circulant", "torch toeplitz pair", "peft c3a"}
    assert peers <= rows.keys()
    assert all(rows[name]["ratio_to_ours"] > 0 for name in peers)


def test_bert(run, tmp_path):
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name, reason="compares with PyTorch: pip install -r requirements-peers.txt")
    out = tmp_path / "rows.json"
    done = run("bert", f"--out={out}", "--variant=tiny", "--batch=2", "--length=8", "--rounds=1")
    assert done.status == 0, done.err
    rows = {row["step"]: row for row in json.loads(out.read_text())}
    assert [*rows] == ["ours circulant", "ours lora", "peft lora", "peft c3a"]
    # Each method trains some vectors of length 128 in three layers of both blocks, and a classifier of two classes.
    head = 2 * 128 + 2
    vectors = {name: (row["parameters"] - head) / (2 * 3 * 128) for name, row in rows.items()}
    assert vectors == {"ours circulant": 2, "ours lora": 2, "peft lora": 2, "peft c3a": 1}
    ours = rows["ours circulant"]
    for row in rows.values():
        assert (row["model"], row["batch"], row["length"]) == ("BERT-tiny", 2, 8)
        assert math.isclose(row["examples_per_s"], 2 / (row["ms"] / 1e3))
        assert math.isclose(row["ratio_to_circulant"], row["ms"] / ours["ms"])
        # All programs have the same weights and batch, and updates that are zero at first, so their losses agree.
        assert math.isclose(row["first_loss"], ours["first_loss"], rel_tol=1e-5)
    done = run("bert", "--variant=tiny", "--length=513")
    assert done.status != 0 and "positions for 512 tokens" in done.out + done.err


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("step", ["lora"], "error: unknown argument 'lora': flags begin with --"),
        ("step", ["--batch=0"], "--batch=0"),
        ("structured", ["--out=missing/x.json"], "error: --out=missing/x.json must name a file in an existing folder"),
        ("structured", ["--out=README.md"], "error: --out=README.md holds something other than rows"),
        ("bank", ["--method=foo"], "--method=foo"),
        ("bank", ["--adapters=a"], "error: --adapters=a must list whole numbers"),
        ("bank", ["--variant=X"], "error: there is no ViT 'X'"),
        ("depth", ["--depths=a"], "error: --depths=a must list whole numbers"),
        ("depth", ["--width=65"], "error: ViTConfig.heads must divide the width"),
        ("input", ["--set=digits_5to9", "--variant=foo"], "error: there is no ViT 'foo'"),
    ],
)
def test_mistakes_are_named_before_anything_is_timed(run, module, arguments, message):
    done = run(module, *arguments)
    assert done.status == 1
    assert message in done.err and "Traceback" not in done.err
    assert not done.out


def test_sentences_are_no_images(run, shared):
    done = run("input", f"--data={shared / 'tfds'}", "--set=glue/rte")
    assert done.status == 1
    assert "error: --set=glue/rte has no images" in done.err and "Traceback" not in done.err


def test_help_lists_the_file_for_the_rows(run):
    done = run("depth", "--help")
    assert "--depths: " in done.out and "--out: " in done.out


@pytest.mark.parametrize(("module", "what"), [("structured", "families"), ("step", "methods")])
def test_an_unknown_name(run, module, what):
    done = run(module, f"--{what}=circulat")
    assert done.status != 0
    assert f"unknown {what} circulat" in done.out + done.err
    assert "Traceback" not in done.err


def test_a_width_that_a_family_cannot_have(run):
    done = run("structured", "--families=Circulant,BlockCirculant", "--sizes=768x8,100x8")
    assert done.status != 0
    said = done.out + done.err
    assert "blocks of 128 do not divide both sizes of 100 x 100" in said
    assert "Traceback" not in said and "tokens, float32" not in said


def test_a_model_that_a_method_cannot_adapt(run):
    done = run("step", "--methods=adapter_drop", "--variant=digits")
    assert done.status != 0
    said = done.out + done.err
    assert "--methods=adapter_drop, ViT-digits" in said and "Traceback" not in said


def test_quantised(run, tmp_path):
    pytest.importorskip("qwix", reason="quantises the base with qwix: pip install -r requirements-peers.txt")
    done = run("quantised", f"--out={tmp_path / 'rows.json'}", "--width=64", "--depth=1", "--tokens=2")
    assert done.status == 0, done.err
    held = {row["base"]: row["base_mb"] for row in json.loads((tmp_path / "rows.json").read_text())}
    assert held["float32"] > 1.9 * held["bfloat16"] > 3 * held["int8"] > 4 * held["nf4"]
