"""The order of the layers, held by reading every import of every file: see docs/architecture.md."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "loratools"

# From the ground up. A file imports from its own layer and from those above it in this list.
LAYERS = (
    "_version",
    "errors",
    "hints",
    "skipped",
    "selection",
    "short_repr",
    "arguments",
    "registry",
    "notebook_html",
    "tensors",
    "algebra",
    "storage",
    "sources",
    "updates",
    "adapted_module",
    "adapter",
    "quantization",
    "checkpoints",
    "naming",
    "matching",
    "formats",
    "methods",
    "checks",
    "execution",
    "charts",
    "ops",
    "report",
    "pages",
    "cli",
    "__main__",
    "__init__",
)
# What shows things to people stays where things are shown.
CONFINED = {"click": {"cli"}, "rich": {"cli", "report"}, "jinja2": {"pages"}}
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def layer_of(file: str) -> str:
    return file.partition("/")[0].removesuffix(".py")


def imported_modules(source: str) -> list[tuple[int, str]]:
    """`(line, dotted name)` of every import, at the top, in functions and for type checkers alike."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            # `from loratools import formats` names a layer with what is imported.
            both = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name) for name in (both if node.module == "loratools" else [str(node.module)])]
    return found


def faults(file: str, source: str) -> list[str]:
    here = layer_of(file)
    found = []
    for line, name in imported_modules(source):
        root, _, rest = name.partition(".")
        if here not in CONFINED.get(root, {here}):
            found.append(f"{file}:{line} imports {root}, which belongs to {' and '.join(sorted(CONFINED[root]))}")
        if root == "loratools":
            # What is no layer is a name of the package's face, which nothing inside the package imports.
            there = layer_of(rest.replace(".", "/"))
            there = there if there in LAYERS else "__init__"
            if LAYERS.index(there) > LAYERS.index(here):
                found.append(f"{file}:{line} imports {name}: {there} comes after {here}")
    return found


def test_every_file_belongs_to_a_layer() -> None:
    assert {layer_of(file) for file in FILES} <= set(LAYERS)


@pytest.mark.parametrize("file", FILES)
def test_file_imports_only_from_layers_above_it(file: str) -> None:
    assert faults(file, (PACKAGE / file).read_text(encoding="utf-8")) == []


def test_no_file_is_private_to_its_folder() -> None:
    # What two rooms need is a file with a name of its own: nobody has to ask which underscores may be imported.
    private = [file for file in FILES if Path(file).stem.startswith("_") and not Path(file).stem.startswith("__")]

    assert private == ["_version.py"]


def test_layering_test_can_fail() -> None:
    bad = """
import click
from rich.table import Table
from loratools import formats
from loratools.adapter import Adapter
from loratools.errors import UsageError

def late():
    from loratools.ops.merge.verb import merge
    from loratools import merge
"""

    assert faults("storage/bad.py", bad) == [
        "storage/bad.py:2 imports click, which belongs to cli",
        "storage/bad.py:3 imports rich, which belongs to cli and report",
        "storage/bad.py:4 imports loratools.formats: formats comes after storage",
        "storage/bad.py:5 imports loratools.adapter: adapter comes after storage",
        "storage/bad.py:9 imports loratools.ops.merge.verb: ops comes after storage",
        "storage/bad.py:10 imports loratools.merge: __init__ comes after storage",
    ]
