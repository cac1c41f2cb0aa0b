"""Hints name only options that the verb has, wherever below the verb they are written."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import click
import pytest

import loratools

PACKAGE = Path(loratools.__file__).parent
# Rooms and files, and the verbs that reach what they raise.
REACHED_BY = {
    "ops/combine": ("combine",),
    "ops/compare": ("compare",),
    "ops/convert": ("convert",),
    "ops/extract": ("extract",),
    "ops/finetune": ("extract", "spectrum"),
    "ops/inspect": ("inspect",),
    "ops/lowrank/factors.py": ("combine", "compare", "resize", "spectrum"),
    "ops/merge": ("merge",),
    "ops/resize": ("resize",),
    "ops/spectrum": ("spectrum",),
    "ops/common/device.py": ("extract", "spectrum"),
    "methods": ("combine",),
    "execution/forked.py": ("merge",),
    "storage/casting.py": ("combine", "convert", "extract", "resize"),
}


def hints(source: str) -> list[str]:
    """The constant texts of every `hint=` argument."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        "".join(
            part.value
            for part in ast.walk(word.value)
            if isinstance(part, ast.Constant) and isinstance(part.value, str)
        )
        for call in calls
        for word in call.keywords
        if word.arg == "hint"
    ]


def options_of(verb: str) -> set[str]:
    command: click.Command = import_module(f"loratools.cli.{verb}").command
    return {name for parameter in command.params for name in parameter.opts}


def missing(hint: str, verb: str) -> set[str]:
    """The options in a hint that neither the verb nor another verb that the hint names has."""
    named = {verb, *re.findall(r"\bloratools ([a-z]+)", hint)}
    return set(re.findall(r"--[a-z][a-z-]*", hint)) - set().union(*map(options_of, named))


@pytest.mark.parametrize("room", REACHED_BY)
def test_hints_name_only_options_of_the_verb(room: str) -> None:
    place = PACKAGE / room
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    wrong = [
        (verb, file.name, hint)
        for file in files
        for hint in hints(file.read_text(encoding="utf-8"))
        for verb in REACHED_BY[room]
        if missing(hint, verb)
    ]

    assert files
    assert wrong == []


def test_an_option_that_the_verb_lacks_is_noticed() -> None:
    (hint,) = hints("raise UsageError('x', hint=f'leave {name} out with --residual')")

    assert missing(hint, "combine") == set()
    assert missing(hint, "merge") == {"--residual"}
