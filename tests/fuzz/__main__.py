"""Read many damaged files, and print how often each outcome occurred and every problem.

The command is `python -m tests.fuzz [--examples=10000] [--first=0] [--seed=0]`.
"""

import argparse
import faulthandler
import os
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from tests.fuzz.run import run

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--examples", type=int, default=10_000)
parser.add_argument("--first", type=int, default=0)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
faulthandler.enable()
with tempfile.TemporaryDirectory() as folder:
    counts, problems = run(Path(folder), range(options.first, options.first + options.examples), options.seed)
for result, count in sorted(counts.items()):
    print(f"{count:6} {result}")
print(*problems, sep="\n\n")
print(f"{counts.total()} examples, {len(problems)} problems")
sys.exit(bool(problems))
