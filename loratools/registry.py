"""A folder is a registry: one file is one entry, and the file's name is the entry's name.

Names and summaries are read without importing the entries, so that help texts and `--method [a|b|c]` stay fast.
Files whose name starts with an underscore are shared by the entries of their folder and are none themselves.
Entries are found as files on disk; a frozen executable has none and is not supported.
"""

from __future__ import annotations

import ast
import difflib
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from loratools.errors import UsageError

_ROOT = Path(__file__).parent


@cache
def names(folder: str) -> tuple[str, ...]:
    """Names of the entries of `loratools/<folder>`, sorted, as people type them (`peft-linear`, not `peft_linear`)."""
    return tuple(sorted(p.stem.replace("_", "-") for p in (_ROOT / folder).glob("*.py") if not p.stem.startswith("_")))


def description(folder: str, name: str) -> str:
    """The entry's docstring, without importing it."""
    tree = ast.parse((_ROOT / folder / f"{name.replace('-', '_')}.py").read_text(encoding="utf-8"))
    return ast.get_docstring(tree) or ""


def summary(folder: str, name: str) -> str:
    """First line of the entry's docstring, without importing it."""
    return description(folder, name).partition("\n")[0]


def load(folder: str, name: str) -> ModuleType:
    """Import the entry `name` of `loratools/<folder>`.

    Raises:
        UsageError: There is no such entry; the message lists those there are.
    """
    if name not in names(folder):
        entry_kind = folder.removesuffix("s")
        near = difflib.get_close_matches(name, names(folder), n=1)
        raise UsageError(
            f"no {entry_kind} named '{name}'; there are: {', '.join(names(folder))}",
            hint=f"did you mean '{near[0]}'?" if near else None,
        )
    return import_module(f"loratools.{folder}.{name.replace('-', '_')}")
