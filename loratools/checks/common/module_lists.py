"""Lists of modules in PEFT's configs: an entry is a module's name, or the end of it after a dot."""

from __future__ import annotations

from collections.abc import Collection


def ends_of(name: str) -> list[str]:
    """The ways in which an entry may name the module: its whole name, and every part of it from a dot on.

    The name of an update of a bias or of a parameter goes on after that of its module.
    """
    parts = name.split(".")
    modules = [parts, parts[:-1]]
    return [".".join(module[at:]) for module in modules for at in range(len(module))]


def is_listed(name: str, entries: Collection[str]) -> bool:
    """Whether an entry names the module."""
    return any(end in entries for end in ends_of(name))
