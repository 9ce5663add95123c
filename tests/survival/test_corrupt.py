"""Tests of unreadable examples and of the limit `config.data.max_corrupt`.

Within the limit they are skipped and counted, with a warning for each, and all other examples keep their places in the
batches. One more stops the run with an error.
"""

import dataclasses
import io
import itertools
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from surm_jax import data
from surm_jax.data import ArraySource, eval_batches, train_batches
from surm_jax.data.corrupt import CorruptExampleError
from surm_jax.data.tfds_sets import TfdsSource
from surm_jax.errors import UserError
from surm_jax.tasks import image_classification
from surm_jax.training.modes import evaluate_run, train_run
from tests.training import tiny
from tests.training.several import ROOT, free_port

COUNT = 11
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 1), np.uint8)


@dataclasses.dataclass(frozen=True)
class Damaged:
    """A source of images that raises an error for some of its examples.

    Attributes:
        source: The source with all examples.
        corrupt: The indices of the examples that cannot be read.
    """

    source: data.ImageSource
    corrupt: frozenset[int]

    @property
    def labels(self):
        return self.source.labels

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index in self.corrupt:
            raise CorruptExampleError(f"the image of example {index} cannot be decoded")
        return self.source[index]


def damaged(*corrupt, count=COUNT):
    return Damaged(ArraySource(IMAGES[:count], np.arange(count)), frozenset(corrupt))


def training(source, **changes):
    arguments = {"batch_size": 4, "image_size": 8, "augment": "affine", "seed": 3, "max_corrupt": 2, **changes}
    return train_batches(source, **arguments)


def rows(batches, steps):
    return [
        (int(label), image.tobytes())
        for batch in itertools.islice(batches, steps)
        for label, image in zip(batch["label"], batch["image"], strict=True)
    ]


@pytest.fixture
def warned():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(one.message) for one in caught]


def test_the_next_readable_one_takes_its_place_and_nothing_else_moves(warned):
    # Each unreadable example is replaced by the next readable one: 3 and 4 by 5, and the last example 10 by the first.
    stands_for = {3: 5, 4: 5, 10: 0}
    batches = training(damaged(3, 4, 10), max_corrupt=3)
    whole, skipped = rows(training(damaged()), 11), rows(batches, 11)
    assert {label for label, _ in whole} == set(range(COUNT))
    for (label, image), (other_label, other_image) in zip(whole, skipped, strict=True):
        assert other_label == stands_for.get(label, label)
        # The random augmentation depends on the place in the batch. So all images are the same except those replaced.
        assert (other_image == image) == (label not in stands_for)
    # The 11 batches cover four epochs, but each unreadable example is named only once.
    assert batches.corrupt == {3, 4, 10}
    assert sorted(warned()) == [f"skipped: the image of example {index} cannot be decoded" for index in (10, 3, 4)]


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_together_see_what_one_sees(process_count, warned):
    whole = rows(training(damaged(0, 7)), 9)
    parts = [
        training(damaged(0, 7), batch_size=4 // process_count, process_index=process, process_count=process_count)
        for process in range(process_count)
    ]
    together = [row for _ in range(9) for part in parts for row in rows(part, 1)]
    assert together == whole
    assert set.union(*(part.corrupt for part in parts)) == {0, 7}


# A program for two processes. Each has a set of indices, and prints the union of both sets.
UNION = """
import sys
from surm_jax.devices import processes
port, number = sys.argv[1:]
processes.start(f"127.0.0.1:{port}", int(number), 2)
print([sorted(processes.union(met[int(number)], 3)) for met in (({3, 10}, {7, 10}), (set(), set()))], file=sys.stderr)
"""


@pytest.mark.exhaustive
def test_processes_tell_each_other_what_they_met(tmp_path):
    port = str(free_port())
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", UNION, port, str(number)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for number in range(2)
    ]
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
        assert "[[3, 7, 10], []]" in said


@pytest.mark.parametrize("split", [1, 2, 6])
def test_going_on_counts_on(split, warned):
    straight = training(damaged(1, 6))
    expected = rows(straight, 8)
    interrupted = training(damaged(1, 6))
    before = rows(interrupted, split)
    state, named = json.loads(json.dumps(interrupted.get_state())), len(warned())
    resumed = training(damaged(1, 6))
    resumed.set_state(state)
    assert before + rows(resumed, 8 - split) == expected
    assert resumed.corrupt == straight.corrupt == {1, 6}
    # After resuming, a warning names an unreadable example only if no warning has named it before.
    assert len(warned()) - named == 2 - len(interrupted.corrupt)


@pytest.mark.parametrize("read_ahead", [0, 4])
def test_one_too_many_stops_at_its_batch_and_is_named(read_ahead, warned):
    batches = training(damaged(2, 5, 8), read_ahead=read_ahead)
    order = [label for label, _ in rows(training(damaged()), 9)]
    # The index of the batch in which the third unreadable example occurs for the first time.
    stop = sorted(order.index(index) for index in (2, 5, 8))[2] // 4
    last = max((2, 5, 8), key=order.index)
    assert len(rows(batches, stop)) == 4 * stop
    with pytest.raises(UserError, match=f"the image of example {last} cannot be decoded; max_corrupt lets 2 such"):
        next(batches)
    assert len(warned()) == 2


def encoded(image, cut=None):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()[:cut]


def test_records_that_do_not_decode(warned):
    images = IMAGES[:5, :, :, 0]
    records = [{"image": encoded(image), "label": index} for index, image in enumerate(images)]
    records[1] = {"image": encoded(images[1], cut=60), "label": 1}
    records[2] = {"image": b"no image", "label": 2}
    records[4] = {"image": encoded(images[4]), "label": 9}
    source = TfdsSource(records, 1, 5, "shapes, split train")
    batches = training(source, max_corrupt=3, augment="none")
    seen = rows(batches, 5)
    assert batches.corrupt == {1, 2, 4} and {label for label, _ in seen} == {0, 3}
    (batch,) = eval_batches(source, batch_size=8, image_size=8, max_corrupt=3)
    assert batch["label"][batch["mask"]].tolist() == [0, 3]
    for index, why in ((1, "the image of example 1 cannot be"), (2, "the image of example 2"), (4, "4 has label 9")):
        assert [text for text in warned() if why in text and text.startswith("skipped: shapes, split train")], index
    with pytest.raises(UserError, match=r"shapes, split train: the image of example 1 cannot be decoded .*max_corrupt"):
        list(eval_batches(source, batch_size=8, image_size=8))


def test_without_a_limit_the_first_stops():
    with pytest.raises(UserError, match="the image of example 5 cannot be decoded; max_corrupt lets 0 such"):
        rows(training(damaged(5), max_corrupt=0), 3)
    with pytest.raises(UserError, match="the image of example 5 cannot be decoded; max_corrupt lets 0 such"):
        list(eval_batches(damaged(5), batch_size=4, image_size=8))


def test_a_source_of_nothing_readable_ends(warned):
    with pytest.raises(UserError, match="example 2 cannot be decoded"):
        training(damaged(0, 1, 2, count=3), max_corrupt=9)


@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_masks_it_out(process_count, warned):
    seen = []
    for process in range(process_count):
        batches = eval_batches(
            damaged(0, 9), batch_size=4, image_size=8, max_corrupt=2, process_index=process, process_count=process_count
        )
        assert batches.examples == COUNT
        for batch in batches:
            assert set(batch) == {"image", "label", "mask", "index"}
            assert not batch["image"][~batch["mask"]].any() and not batch["label"][~batch["mask"]].any()
            seen += batch["label"][batch["mask"]].tolist()
    assert sorted(seen) == [1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert sorted(warned()) == [f"skipped: the image of example {index} cannot be decoded" for index in (0, 9)]
    with pytest.raises(UserError, match="example 9 cannot be decoded; max_corrupt lets 1 such"):
        list(eval_batches(damaged(0, 9), batch_size=4, image_size=8, max_corrupt=1))


def test_a_run_counts_what_it_skipped(tiny_files, tmp_path, monkeypatch, warned, capsys):
    load = data.load

    def damaged_load(name, data_dir=None):
        whole = load(name, data_dir)
        train, test = Damaged(whole.train, frozenset({4, 30})), Damaged(whole.test, frozenset({0}))
        return dataclasses.replace(whole, train=train, test=test)

    monkeypatch.setattr(image_classification.data, "load", damaged_load)
    values = {"optim.steps": 6, "log.evaluate_every": 3}
    with pytest.raises(UserError, match=r"cannot be decoded; max_corrupt lets 1 such examples be skipped"):
        train_run(tiny.make_config(tiny_files, "linear_probe", **values, **{"data.max_corrupt": 1}), tmp_path / "one")
    config = tiny.make_config(tiny_files, "linear_probe", **values, **{"data.max_corrupt": 2})
    result = train_run(config, tmp_path / "two")
    # 6 batches of 16 examples cover all 40 training images, and thus both unreadable ones.
    assert result["corrupt_examples"] == {"train": 2, "test": 1}
    assert result["examples"] == {"test": 20}
    assert "skipped: the image of example 30 cannot be decoded" in warned()
    # If the result is deleted, the next start makes it again, with the unreadable examples stored in the checkpoint.
    (tmp_path / "two" / "result.json").unlink()
    again = train_run(config, tmp_path / "two")
    assert again["corrupt_examples"] == result["corrupt_examples"] and again["metrics"] == result["metrics"]
    assert evaluate_run(tmp_path / "two", {})[0]["test"]["examples"] == 20
