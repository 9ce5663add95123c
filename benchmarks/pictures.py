"""Draw the pictures of docs/structured.md, one for each family of structured matrices.

    python -m benchmarks.pictures

By default the files are written to docs/structured, so run this command in the root folder of the repository.
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from surm_jax.structured import FAMILIES
from surm_jax.structured.analysis.draw import draw

#: The families to draw: all but `Dense`, which has no structure to show.
SHOWN = tuple(name for name in FAMILIES if name != "Dense")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a PNG file for each family into the folder of `--out`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all")
    parser.add_argument("--out", type=Path, default=Path("docs/structured"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.families if name not in SHOWN]:
        parser.error(f"unknown family {unknown[0]!r} (known: {', '.join(SHOWN)})")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.families or SHOWN:
        drawn = io.BytesIO()
        draw(FAMILIES[name].example()).savefig(drawn, dpi=100)
        # A palette of 128 colours is enough and halves the size of the file.
        Image.open(drawn).convert("RGB").quantize(128).save(options.out / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
