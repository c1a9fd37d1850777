"""The notebook runs from its first cell to its last, on a tiny random model, and is small."""

from pathlib import Path

import pytest

import tiny_model

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "stem.ipynb"
MOST_BYTES = 100_000


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("STEM_NOTEBOOK_MODEL", tiny_model.save(str(tmp_path / "model")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output
    )
    assert "2 of 2 calls ran sparse" in printed
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert any("image/png" in picture["data"] for picture in pictures)


def test_the_notebook_is_small_and_says_what_it_needs(notebook):
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    assert 'pip install --quiet "stem-attn[hf]"' in notebook.cells[1].source
    errors = [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "error"]
    assert errors == []
