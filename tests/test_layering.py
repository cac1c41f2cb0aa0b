"""The order of the layers, held by reading every import of every file: see docs/architecture.md."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "loratools"

# From the ground up. A file imports from its own layer and from those above it in this list.
LAYERS = (
    "__init__",
    "errors",
    "registry",
    "tensors",
    "algebra",
    "storage",
    "updates",
    "adapter",
    "quantization",
    "checkpoints",
    "naming",
    "matching",
    "formats",
    "methods",
    "plan",
    "execution",
    "ops",
    "report",
    "cli",
    "__main__",
)
# What shows things to people stays where things are shown.
CONFINED = {"click": {"cli"}, "rich": {"cli", "report"}}
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
            # What is no layer is a name of the package itself, such as __version__.
            there = layer_of(rest.replace(".", "/"))
            there = there if there in LAYERS else "__init__"
            if LAYERS.index(there) > LAYERS.index(here):
                found.append(f"{file}:{line} imports {name}: {there} comes after {here}")
    return found


def test_every_file_belongs_to_a_layer() -> None:
    assert {layer_of(file) for file in FILES} <= set(LAYERS)


# `__init__` resolves the public names on first use, and names their homes for type checkers: no other file depends on
# what it resolves, which `faults` sees as an import of the package itself.
@pytest.mark.parametrize("file", [f for f in FILES if f != "__init__.py"])
def test_file_imports_only_from_layers_above_it(file: str) -> None:
    assert faults(file, (PACKAGE / file).read_text(encoding="utf-8")) == []


def test_no_file_takes_a_verb_from_the_package_itself() -> None:
    taken = {
        f"{file}:{line} {name}"
        for file in FILES
        for line, name in imported_modules((PACKAGE / file).read_text(encoding="utf-8"))
        if name.startswith("loratools.") and name.split(".")[1] not in {*LAYERS, "__version__"}
    }

    assert taken == set()


def test_layering_test_can_fail() -> None:
    bad = """
import click
from rich.table import Table
from loratools import formats
from loratools.adapter import Adapter
from loratools.errors import UsageError

def late():
    from loratools.ops.merge import merge
"""

    assert faults("storage/bad.py", bad) == [
        "storage/bad.py:2 imports click, which belongs to cli",
        "storage/bad.py:3 imports rich, which belongs to cli and report",
        "storage/bad.py:4 imports loratools.formats: formats comes after storage",
        "storage/bad.py:5 imports loratools.adapter: adapter comes after storage",
        "storage/bad.py:9 imports loratools.ops.merge: ops comes after storage",
    ]
