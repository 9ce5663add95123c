import pytest

from surm_jax.data.corrupt import CorruptExampleError, Readable, skipping


class Source:
    """A source of six examples, of which those with indices in `corrupt` cannot be read."""

    def __init__(self, *corrupt):
        self.corrupt = corrupt

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index in self.corrupt:
            raise CorruptExampleError(f"example {index} is broken")
        return {"label": index}


def test_a_corrupt_example_is_replaced_by_the_next_readable_one():
    source = Readable(Source(1, 2, 5), max_corrupt=3)
    assert [source[index]["label"] for index in range(6)] == [0, 3, 3, 3, 4, 0]
    assert source[0]["corrupt"] == {}
    assert source[1]["corrupt"] == {1: "example 1 is broken", 2: "example 2 is broken"}


def test_one_too_many_ends_reading():
    source = Readable(Source(1, 2), max_corrupt=1)
    assert source[2]["label"] == 3
    with pytest.raises(CorruptExampleError, match="example 2 is broken; max_corrupt lets 1 such examples be skipped"):
        source[1]


def test_a_source_without_a_readable_example():
    with pytest.raises(CorruptExampleError, match="example 5 is broken"):
        Readable(Source(*range(6)), max_corrupt=10)[0]


def test_skipping_warns_up_to_the_limit():
    with pytest.warns(UserWarning, match="skipped: example 1 is broken"):
        skipping("example 1 is broken", 2, 2)
    with pytest.raises(CorruptExampleError, match="max_corrupt lets 2 such examples be skipped"):
        skipping("example 1 is broken", 3, 2)
