"""Tests of `draw` and `origins`, and of the pictures in `docs/structured.md`."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from surm_jax.errors import UserError
from surm_jax.structured import FAMILIES, Circulant, CirculantPair, LowRank, SkewCirculant
from surm_jax.structured.analysis.draw import PALETTES, VALUES, draw
from surm_jax.structured.analysis.origins import origins

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "structured.md"


def random(matrix):
    rng = np.random.default_rng(0)
    return matrix.with_arrays(**{k: jnp.asarray(rng.normal(size=v.shape), v.dtype) for k, v in matrix.arrays().items()})


def zeros(family, shape, **options):
    return jax.eval_shape(lambda: family.init(jax.random.key(0), shape, scale=1.0, **options))


def pictures(figure):
    """Return the colours of all matrices and colour bars in a figure, from left to right and from top to bottom."""
    axes = sorted((a for a in figure.axes if a.images), key=lambda a: (a.get_position().x0, -a.get_position().y0))
    return [np.asarray(a.images[0].get_array()) for a in axes]


def symbols(figure):
    texts = sorted(figure.texts, key=lambda text: text.get_position()[0])
    return [text.get_text() for text in texts if text is not figure._suptitle]


# Origins


def test_origins_of_a_rectangular_circulant():
    scale, places = origins(random(zeros(Circulant, (2, 4))))
    np.testing.assert_allclose(scale, np.ones((2, 4)))
    np.testing.assert_array_equal(places["c"], [[0, 1, 2, 3], [3, 0, 1, 2]])


def test_origins_of_products_of_parameters():
    scale, places = origins(-3.0 * zeros(LowRank, (2, 3), rank=1))
    np.testing.assert_allclose(scale, np.full((2, 3), -3.0))
    np.testing.assert_array_equal(places["matrix_up"], [[0, 1, 2], [0, 1, 2]])
    np.testing.assert_array_equal(places["matrix_down"], [[0, 0, 0], [1, 1, 1]])


def test_origins_where_some_numbers_go_nowhere_and_some_entries_are_zero():
    scale, places = origins(zeros(FAMILIES["FCirculant"], (3, 2), f=0.0))
    np.testing.assert_array_equal(scale != 0, [[True, True], [False, True], [False, False]])
    np.testing.assert_array_equal(places["v"][scale != 0], [0, 1, 0])


def test_sums_have_no_origins():
    assert origins(zeros(LowRank, (4, 4), rank=2)) is None
    assert origins(zeros(Circulant, (3, 3)) + zeros(Circulant, (3, 3))) is None
    assert origins(zeros(Circulant, (3, 3)) @ zeros(Circulant, (3, 3))) is None


# Colours


def test_every_number_has_its_colour_where_it_goes():
    strip, M = pictures(draw(random(zeros(Circulant, (3, 5)))))
    assert strip.shape == (1, 5, 3) and M.shape == (3, 5, 3)
    assert len(np.unique(strip[0], axis=0)) == 5
    for i, j in np.ndindex(3, 5):
        np.testing.assert_array_equal(M[i, j], strip[0, (j - i) % 5])


def test_a_negative_sign_is_dark_and_has_a_minus():
    figure = draw(random(zeros(SkewCirculant, (3, 3))))
    strip, M = pictures(figure)
    np.testing.assert_array_equal(M[0], strip[0])
    assert np.all(M[1, 0] < 0.6 * strip[0, 2])
    written = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert written.count("$v_{2}$") == 2 and written.count("$-v_{2}$") == 2


def test_a_product_of_parameters_has_the_product_of_their_colours():
    figure = draw(random(zeros(CirculantPair, (4, 4))))
    strip1, first, strip2, second, M = pictures(figure)
    assert strip1.shape == strip2.shape == (1, 4, 3)
    np.testing.assert_allclose(M, first * second)
    assert symbols(figure) == ["$Z_1(r_1)^\\top$", "$\\circ$", "$Z_1(r_2)^\\top$", "$=$", "$M$"]
    np.testing.assert_allclose(strip1[0, 0], PALETTES[0](0.0)[:3])
    np.testing.assert_allclose(strip2[0, 0], PALETTES[1](0.0)[:3])


def test_a_matrix_of_sums_is_drawn_by_value_beside_its_factors():
    matrix = random(zeros(LowRank, (6, 5), rank=2))
    figure = draw(matrix)
    down, up, ramp, M = sorted(pictures(figure), key=lambda p: (p.ndim == 3 and p.shape[:2] == (6, 5), p.ndim == 2))
    assert down.shape == (6, 2, 3) and up.shape == (2, 5, 3) and ramp.shape == (1, 128)
    dense = np.asarray(matrix.to_dense(), np.float64)
    np.testing.assert_allclose(M, VALUES(0.5 + dense / np.abs(dense).max() / 2)[..., :3])
    assert symbols(figure) == ["$\\mathrm{down}$", "$\\times$", "$\\mathrm{up}$", "$=$", "$M$"]


def test_a_sum_shows_its_terms():
    C, L = random(zeros(Circulant, (4, 4))), random(zeros(LowRank, (4, 4), rank=1))
    circulant, low_rank, product = (f"$\\mathrm{{{name}}}$" for name in ("Circulant", "LowRank", "Product"))
    end = ["$=$", "$M$"]
    assert symbols(draw(C - 0.5 * L)) == [circulant, "$+$", "$-0.5\\,\\times$", low_rank, *end]
    assert symbols(draw(C + L + C)) == [circulant, "$+$", low_rank, "$+\\cdots$", *end]
    assert symbols(draw(C @ (2.0 * L))) == [circulant, "$\\times$", "$2\\,\\times$", low_rank, *end]
    assert symbols(draw(jnp.float32(2) * (C @ L))) == ["$\\alpha\\,\\times$", product, *end]
    assert draw(2.0 * C).get_suptitle() == "Scaled, 4 x 4, 4 parameters"


@pytest.mark.parametrize("shape", [(1, 1), (400, 300)], ids=str)
def test_small_and_large(shape, tmp_path):
    figure = draw(random(zeros(CirculantPair, shape)))
    figure.savefig(tmp_path / "pair.png", dpi=100)
    height, width = matplotlib.image.imread(tmp_path / "pair.png").shape[:2]
    assert 200 < height < 600 and 300 < width < 1400
    assert len([text for axes in figure.axes for text in axes.texts]) == (5 if shape == (1, 1) else 0)


def test_all_zeros():
    figure = draw(LowRank.init(jax.random.key(0), (4, 4), scale=1.0, rank=2))
    M = next(p for p in pictures(figure) if p.shape == (4, 4, 3))
    np.testing.assert_allclose(M, np.broadcast_to(VALUES(0.5)[:3], M.shape))


def test_what_cannot_be_drawn():
    with pytest.raises(UserError, match="draw takes a structured matrix, not array"):
        draw(np.ones((2, 2)))
    with pytest.raises(UserError, match="holds numbers that are not finite"):
        draw(Circulant(jnp.array([1.0, jnp.nan]), shape=(2, 2)))


def test_the_package_does_not_load_matplotlib_and_drawing_not_pyplot():
    program = (
        "import sys, jax.numpy as jnp, surm_jax.structured as s; assert 'matplotlib' not in sys.modules\n"
        "from surm_jax.structured.analysis.draw import draw; draw(s.Circulant(jnp.ones(3), shape=(3, 3)))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


# The page


def test_every_family_is_on_the_page_with_its_picture():
    from benchmarks.pictures import SHOWN

    page = PAGE.read_text()
    headings = re.findall(r"^## .*`(\w+)`", page, re.MULTILINE)
    shown = [name for name in SHOWN if FAMILIES[name].__module__.startswith("surm_jax.")]
    assert sorted(headings) == sorted(shown)
    for name in shown:
        picture = PAGE.parent / "structured" / f"{name}.png"
        assert f"(structured/{name}.png)" in page
        assert picture.stat().st_size < 60_000
        assert matplotlib.image.imread(picture).shape[2] in (3, 4)


def test_the_code_on_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dense = jnp.ones((768, 3072))
    names = {"jax": jax, "Circulant": Circulant, "x": jnp.ones((2, 768)), "dense": dense}
    first, second = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(first, names)
    assert names["y"].shape == (2, 3072)
    names["M"] = random(zeros(Circulant, (3, 3)))
    exec(second, names)
    assert (tmp_path / "matrix.png").exists()


@pytest.mark.parametrize("name", ["Circulant", "Kronecker"])
def test_pictures_of_the_page_are_those_of_its_command(name, tmp_path):
    from benchmarks.pictures import main

    assert "python -m benchmarks.pictures" in PAGE.read_text()
    main(["--out", str(tmp_path), name])
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.png"]
    drawn, shown = (
        matplotlib.image.imread(folder / f"{name}.png") for folder in (tmp_path, PAGE.parent / "structured")
    )
    assert drawn.shape == shown.shape
    assert np.mean(np.abs(drawn - shown)) < 0.02, f"docs/structured/{name}.png is out of date"
