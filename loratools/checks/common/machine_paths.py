"""Paths that mean something on one machine only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

_ABSOLUTE = re.compile(r"(/|~[/\\]|[A-Za-z]:[\\/]|\\\\|file://)\S")
# Within a longer text only paths that can be nothing else: of homes, of places where people mount disks, of drives.
_INSIDE = re.compile(
    r"(?<![\w.:/])(?:/(?:home|Users|root|mnt|media|workspace|kaggle|data|tmp|content|opt|scratch)/|[A-Za-z]:[\\/](?![\\/]))"
    r"[^\s\"',;]+"
)


def is_machine_path(text: str) -> bool:
    """Whether a text that names a model is an absolute path, or one that begins in a home folder."""
    return _ABSOLUTE.match(text) is not None


def machine_paths(value: object) -> list[str]:
    """Paths of a machine in a text, or in any text of a JSON value."""
    return [match[0] for text in _texts(value) for match in _INSIDE.finditer(text)]


def _texts(value: object) -> Iterator[str]:
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, Mapping):
            waiting += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple):
            waiting += each
