"""A short fuzz test with 320 damaged examples. `python -m tests.fuzz` reads thousands of them."""

import pytest

from tests.fuzz.run import run
from tests.fuzz.subjects import SUBJECTS
from tests.speeds import fast


@pytest.mark.parametrize("name", fast(SUBJECTS, "ours_several", "peft_lora"))
def test_what_is_damaged_has_the_same_bytes_each_time(name, tmp_path):
    # Otherwise the seed and the number of an example would not give the same damaged files again.
    contents = []
    for folder in (tmp_path / "one" / name, tmp_path / "other" / name, tmp_path / "third" / name):
        folder.mkdir(parents=True)
        SUBJECTS[name].write(folder)
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] and contents[0] == contents[1] == contents[2]


@pytest.mark.exhaustive
def test_damaged_files_give_errors(tmp_path):
    counts, problems = run(tmp_path, range(320), seed=0)
    assert not problems, "\n\n".join(problems)
    assert sum(count for result, count in counts.items() if result.endswith("refused")) > 200
