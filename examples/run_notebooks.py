"""Run the notebooks of this folder and store their outputs in them: `python examples/run_notebooks.py [NAME...]`.

Needs nbclient and ipykernel, which come with `make oracles`. What the notebooks write goes into `examples/output/`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent


def executed(notebook: Path, folder: Path) -> NotebookNode:
    """The notebook with the outputs of all its cells, run from the first to the last in a kernel of this Python.

    Args:
        notebook: The file.
        folder: The working folder of the kernel; `fixtures/` is expected beside it.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    node = nbformat.read(notebook, as_version=4)
    # On a busy machine, a kernel takes longer to start than the minute that nbclient would wait.
    NotebookClient(
        node,
        timeout=600,
        startup_timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    for cell in node.cells:
        # When each cell ran; it would change the file on every run.
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            # Warnings of other packages name folders of the machine.
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    # The version of Python that ran it, which nobody needs to know.
    node.metadata.language_info = {"name": "python"}
    return node


def main() -> None:
    names = sys.argv[1:] or sorted(file.name for file in FOLDER.glob("*.ipynb"))
    for name in names:
        nbformat.write(executed(FOLDER / name, FOLDER), FOLDER / name)
        print(name)


if __name__ == "__main__":
    main()
