"""Runs a notebook in a kernel of its own, as Jupyter does.

    python tests/notebooks.py examples/tour.ipynb

runs it and writes what its cells show into it, but for standard error, which names this machine's folders.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]


def run_cells(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """The notebook with what its cells show, run in `folder`; an exception of a cell is one here."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    return client.execute(env=os.environ | {"PYTHONPATH": path})


def main(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        notebook = run_cells(nbformat.read(path, 4), Path(folder))
    for cell in notebook.cells:
        cell.metadata.clear()  # times of execution
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
