"""Names say what is in them: words that fit anything are no names of variables, parameters, functions or attributes."""

import ast
from collections.abc import Set
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "loratools"
# Participles and pronouns that say what was done and not to what, and containers that say nothing of what they hold.
RIDDLES = frozenset({
    "found", "told", "own", "said", "thing", "things", "stuff", "tmp", "foo", "look", "looked", "turned", "taken",
    "tell", "its", "obj", "res", "ret", "retval", "whatever", "something", "made", "kept", "placed", "whole", "left",
    "rest", "got", "given", "done", "seen", "gone", "put", "mine", "ours", "theirs", "those", "these", "this", "both",
    "some", "further", "alone", "beside", "here", "there", "who", "which", "how", "again",
})  # fmt: skip
# Words of a field, or of a document that programs read: a name that is also a key of JSON, or an option.
TERMS = {
    "ops/clean.py": {"kept"},  # the document of `clean --json`: removed, kept, failed
    "ops/convert/report.py": {"kept"},  # the document of `convert --json`: kept, recomputed
    "ops/extract/verb.py": {"whole"},  # extract --whole
    "ops/listing/rows.py": {"how"},  # the document of `list --json`: how two adapters are the same
}
# The other side of a product, of a picture or of a page: where one of these has a name, `left` is a side.
OTHER_SIDES = frozenset({"right", "above", "up"})


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


def sides_in(source: str) -> set[int]:
    """The lines of functions and classes that name another side than the left one."""
    scopes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return {
        line
        for scope in scopes
        if OTHER_SIDES & {name for _, name in names_in(ast.unparse(scope))}
        for line in range(scope.lineno, (scope.end_lineno or scope.lineno) + 1)
    }


def riddles_in(source: str, terms: Set[str] = frozenset()) -> list[str]:
    """`line: name` of the names that say nothing, but for terms, and for `left` where it is a side."""
    sides = sides_in(source)
    return [
        f"{line}: {name}"
        for line, name in sorted(names_in(source))
        if (word := name.lower().strip("_")) in RIDDLES - terms and not (word == "left" and line in sides)
    ]


@pytest.mark.parametrize("file", sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")))
def test_no_name_is_a_riddle(file: str) -> None:
    assert riddles_in((PACKAGE / file).read_text(encoding="utf-8"), TERMS.get(file, frozenset())) == []


@pytest.mark.parametrize("file", sorted(TERMS))
def test_each_exception_is_needed(file: str) -> None:
    riddles = riddles_in((PACKAGE / file).read_text(encoding="utf-8"))

    assert {riddle.partition(": ")[2] for riddle in riddles} == TERMS[file]


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
        "def f():\n    left = 1",
        "def f():\n    left = 1\ndef g():\n    left, right = 1, 2",
        "class C:\n    kept: int = 0",
        "first, *rest = a",
    ],
)
def test_each_way_to_give_a_name_is_seen(source: str) -> None:
    assert len(riddles_in(source)) == 1


def test_words_within_a_longer_name_and_in_use_are_no_riddles() -> None:
    assert riddles_in("def f():\n    left, right = 1, 2\n    return left") == []
    assert riddles_in("found_files = look_up(x.found)\nprint(found)") == []
