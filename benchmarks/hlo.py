"""Find the operations by which devices exchange data (collectives) in the text of compiled programs."""

import math
import re
from typing import NamedTuple

_COLLECTIVE = re.compile(
    r" = (\(.*?\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_SHAPE = re.compile(r"\b([a-z]+)(\d+)\[([\d,]*)\]")


class Collective(NamedTuple):
    """A collective operation of a compiled program.

    Attributes:
        name: The name of the operation in HLO, such as "all-reduce".
        sizes: The number of elements of each result.
        bytes: The size of all results together, in bytes.
    """

    name: str
    sizes: tuple[int, ...]
    bytes: int


def collectives(hlo: str) -> list[Collective]:
    """Return the collective operations in the text of a compiled program.

    Sizes are those of the results on one device. An operation in the body of a loop is listed once, however often the
    loop runs.

    Args:
        hlo: The text of the program, such as `compiled.as_text()`.

    In the example, one operation reduces a float32 array of 6 elements and a bfloat16 scalar, together 26 bytes.

    >>> collectives("  %r = (f32[2,3]{1,0}, bf16[]) all-reduce(%a, %b), channel_id=1")
    [Collective(name='all-reduce', sizes=(6, 1), bytes=26)]
    """
    found = []
    for result, name in _COLLECTIVE.findall(hlo):
        shapes = [
            (math.prod(int(length) for length in shape.split(",") if length), int(bits))
            for _, bits, shape in _SHAPE.findall(result)
        ]
        sizes = tuple(size for size, _ in shapes)
        found.append(Collective(name, sizes, sum(size * bits // 8 for size, bits in shapes)))
    return found


def gathered_sizes(hlo: str) -> list[int]:
    """Return how many elements each all-gather in the text of a compiled program returns, in its largest result.

    >>> gathered_sizes("  %all-gather = f32[16,5,64]{2,1,0} all-gather(%param), channel_id=1")
    [5120]
    """
    return [max(found.sizes) for found in collectives(hlo) if found.name == "all-gather"]
