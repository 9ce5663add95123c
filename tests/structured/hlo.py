"""Reading compiled programs: how much is gathered over the mesh."""

import math
import re

_GATHER = re.compile(r" = (\(.*?\)|\S+) all-gather(?:-start)?\(")
_SHAPE = re.compile(r"\b[a-z]+\d+\[([\d,]*)\]")


def gathered_sizes(hlo: str) -> list[int]:
    """The number of elements of every all-gather's largest result in the text of a compiled program.

    >>> gathered_sizes("  %all-gather = f32[16,5,64]{2,1,0} all-gather(%param), channel_id=1")
    [5120]
    """
    return [
        max(math.prod(int(size) for size in shape.split(",") if size) for shape in _SHAPE.findall(result))
        for result in _GATHER.findall(hlo)
    ]
