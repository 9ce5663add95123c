"""Draw the picture of every family for docs/structured.md: `python -m benchmarks.pictures`, from the root."""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from surm_jax.structured import FAMILIES, StructuredMatrix
from surm_jax.structured.analysis.draw import draw

EXAMPLES = {
    "Circulant": ((8, 8), {}),
    "CirculantPair": ((6, 6), {}),
    "SkewCirculant": ((5, 8), {}),
    "FCirculant": ((8, 8), {"f": 0.5}),
    "Toeplitz": ((6, 8), {}),
    "SymmetricToeplitz": ((8, 8), {}),
    "ToeplitzPair": ((5, 5), {}),
    "SymmetricToeplitzPair": ((8, 8), {}),
    "LowDisplacementRank": ((8, 8), {"rank": 1}),
    "Kronecker": ((12, 12), {}),
    "LowRankKronecker": ((8, 8), {"rank": 1, "factors": ((2, 2), (4, 4))}),
    "LowRank": ((8, 6), {"rank": 1}),
    "BlockCirculant": ((6, 9), {"block": 3}),
    "Tiled": ((6, 8), {"side": 3}),
}
"""The shape and the options of the matrix that is drawn, for each family."""


def example(name: str) -> StructuredMatrix:
    """Return a member of the family with random numbers, the same on every call."""
    shape, options = EXAMPLES[name]
    start = FAMILIES[name].init(jax.random.key(0), shape, scale=1.0, **options)
    rng = np.random.default_rng(0)
    return start.with_arrays(**{k: jnp.asarray(rng.normal(size=v.shape), v.dtype) for k, v in start.arrays().items()})


def main(arguments: Sequence[str] | None = None) -> None:
    """Write one PNG for each family into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all")
    parser.add_argument("--out", type=Path, default=Path("docs/structured"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.families if name not in EXAMPLES]:
        parser.error(f"unknown family {unknown[0]!r} (known: {', '.join(EXAMPLES)})")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.families or EXAMPLES:
        drawn = io.BytesIO()
        draw(example(name)).savefig(drawn, dpi=100)
        # 128 colours are enough and halve the file.
        Image.open(drawn).convert("RGB").quantize(128).save(options.out / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
