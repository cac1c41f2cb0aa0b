"""Names say what is in them: words that fit anything are no names of variables, parameters, functions or attributes."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "loratools"
# Participles and pronouns that say what was done and not to what, and containers that say nothing of what they hold.
RIDDLES = frozenset({
    "found", "told", "own", "said", "thing", "things", "stuff", "tmp", "foo", "look", "looked", "turned", "taken",
    "tell", "its", "obj", "res", "ret", "retval", "whatever", "something",
})  # fmt: skip


def names_in(source: str) -> set[tuple[int, str]]:
    """`(line, name)` of everything that is given a name: variables, parameters, functions, attributes, imports."""
    names: set[tuple[int, str]] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add((node.lineno, node.name))
        elif isinstance(node, ast.arg):
            names.add((node.lineno, node.arg))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add((node.lineno, node.id))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add((node.lineno, node.attr))
        elif isinstance(node, ast.alias) and node.asname:
            names.add((node.lineno, node.asname))
    return names


def riddles_in(source: str) -> list[str]:
    return [f"{line}: {name}" for line, name in sorted(names_in(source)) if name.lower().strip("_") in RIDDLES]


@pytest.mark.parametrize("file", sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")))
def test_no_name_is_a_riddle(file: str) -> None:
    assert riddles_in((PACKAGE / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "found = 1",
        "def told(): ...",
        "def f(own): ...",
        "class C:\n    _said: int = 0",
        "for thing in []: ...",
        "a.tmp = 2",
        "import os as stuff",
        "[1 for found in []]",
        "(found := 1)",
        "with a as found: ...",
    ],
)
def test_each_way_to_give_a_name_is_seen(source: str) -> None:
    assert len(riddles_in(source)) == 1


def test_words_within_a_longer_name_and_in_use_are_no_riddles() -> None:
    assert riddles_in("found_files = look_up(x.found)\nprint(found)") == []
