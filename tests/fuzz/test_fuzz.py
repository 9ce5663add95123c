"""Some hundred of the damaged files that `python -m tests.fuzz` makes by the thousand."""

from tests.fuzz.run import run


def test_damaged_files_give_errors(tmp_path):
    counts, problems = run(tmp_path, range(320), seed=0)
    assert not problems, "\n\n".join(problems)
    assert sum(count for result, count in counts.items() if result.endswith("refused")) > 200
