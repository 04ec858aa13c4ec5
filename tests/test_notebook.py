"""docs/method.ipynb runs from its first cell to its last, here with less text and fewer steps."""

import re
from pathlib import Path

import nbclient
import nbformat

DOCS = Path(__file__).parent.parent / "docs"


def outputs(notebook, name):
    """All outputs of that name ("text", "data") of a notebook's cells."""
    every = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output[name] for output in every if name in output]


def test_the_notebook_runs(tmp_path):
    notebook = nbformat.read(DOCS / "method.ipynb", as_version=4)
    assert sum("image/png" in data for data in outputs(notebook, "data")) == 2  # as committed
    for cell in notebook.cells:
        source = cell.source.replace("runs/notebook", str(tmp_path)).replace("--words 40000", "--words 3000")
        cell.source = re.sub(
            r"--epochs \d+", "--steps 3", source.replace("--vocab-size 2000", "--vocab-size 400")
        )
    resources = {"metadata": {"path": str(DOCS)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    text = "".join(outputs(notebook, "text"))
    assert "largest difference of the gradients" in text and "student minus control" in text
