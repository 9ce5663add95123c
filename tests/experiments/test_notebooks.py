"""Tests that every notebook runs from its first to its last cell, with settings that keep it short."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "experiments" / "notebooks"
# For each notebook, the code that replaces its cell of parameters, and a text that the notebook must print.
SMALL = {
    "tour_of_the_matrices.ipynb": ("WIDTH = 12", "Circulant                12 numbers   rank 12"),
    "adapt_your_own_model.ipynb": ("STEPS = 20", "refused: "),
    "the_papers_tables.ipynb": ("SHOWN = 3", "rank one"),
}


def test_every_notebook_is_run():
    assert {path.name for path in FOLDER.glob("*.ipynb")} == set(SMALL)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SMALL)
def test_notebook(name, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(FOLDER / name, as_version=4)
    settings, printed = SMALL[name]
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = settings
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    assert printed in text
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (FOLDER / name).stat().st_size < 400_000
