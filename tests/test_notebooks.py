"""The notebooks in `examples/` run from the first cell to the last, and show what their cells print."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import peers
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
IDS = [notebook.stem for notebook in NOTEBOOKS]


def runner() -> ModuleType:
    """`examples/run_notebooks.py`, which is in no package, as a module."""
    spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "examples" / "run_notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def words_shown(cell: dict[str, Any]) -> list[str]:
    """Every output of a cell: its kinds and its printed words. Digits, which rounding and time decide, are left out."""
    shown = []
    for output in cell["outputs"]:
        text = "".join(output.get("text", ())) or "".join(output.get("data", {}).get("text/plain", ()))
        kinds = " ".join(sorted(output.get("data", ())))
        shown.append(" ".join([kinds, *re.findall(r"[^\W\d_]{2,}", text)]))
    return shown


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=IDS)
@peers.needs("nbclient", "nbformat", "ipykernel", "matplotlib")
@pytest.mark.timeout(900)
def test_notebooks_run_and_hold_the_outputs_of_their_cells(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    folder = tmp_path / "examples"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    executed = json.loads(json.dumps(runner().executed(notebook, folder)))

    stored = json.loads(notebook.read_text(encoding="utf-8"))
    assert [words_shown(cell) for cell in code_cells(executed)] == [words_shown(cell) for cell in code_cells(stored)]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=IDS)
def test_notebooks_are_stored_with_outputs_and_without_traces_of_a_run(notebook: Path) -> None:
    stored = json.loads(notebook.read_text(encoding="utf-8"))

    assert [cell["source"] for cell in code_cells(stored) if cell["execution_count"] is None] == []
    assert any(cell["outputs"] for cell in code_cells(stored))
    assert [output for cell in code_cells(stored) for output in cell["outputs"] if output.get("name") == "stderr"] == []
    assert stored["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook.stat().st_size < 600_000


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=IDS)
def test_links_of_notebooks_lead_to_files(notebook: Path) -> None:
    stored = json.loads(notebook.read_text(encoding="utf-8"))
    text = "".join("".join(cell["source"]) for cell in stored["cells"] if cell["cell_type"] == "markdown")

    links = re.findall(r"\]\(([^)#]+)", text)
    assert len(links) > 1
    assert [link for link in links if not (notebook.parent / link).exists()] == []


def test_there_are_three_notebooks() -> None:
    assert IDS == ["combining", "first_look", "which_rank"]
