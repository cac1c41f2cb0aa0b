"""What a card says of the inputs: their names, without the folders of this machine, and their licences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loratools.errors import LoraToolsError
from loratools.storage.files import read_whole

CARD = "README.md"
_MOST_BYTES = 1 << 20
_CACHED = re.compile(r"models--([^/\\]+?)--([^/\\]+)")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_LICENCE_FIELDS = ("license", "license_name", "license_link")
# Folders before a name, of an absolute path that a warning of an input holds.
_FOLDERS = re.compile(r"(?<![\w.:/])(?:[A-Za-z]:)?[/\\](?:[^/\\'\"<>|:*?\s]+[/\\])+")


@dataclass(frozen=True)
class CardInput:
    """An input of an output that gets a card.

    Attributes:
        name: Its id on the hub, or the name of its file or folder.
        path: Where it lies; None if it was made in memory.
    """

    name: str
    path: Path | None


@dataclass(frozen=True)
class Licence:
    """The licence that follows from the cards of the inputs.

    Attributes:
        fields: What the head of the card says of it; empty if nothing follows.
        sentence: The same for people.
    """

    fields: Mapping[str, str]
    sentence: str


def card_input(path: Path | None, name: str = "an adapter made in memory") -> CardInput:
    """Return an input by its path; `name` is for one that has none."""
    return CardInput(repository_of(path) or name if path is not None else name, path)


def repository_of(path: Path) -> str | None:
    """Return the id on the hub of what lies at a path, or else the name of its file or folder.

    A folder of the hub's cache says its id, and what is written like an id and is no path of this machine is one.
    """
    for part in path.parts:
        if (cached := _CACHED.fullmatch(part)) is not None:
            return f"{cached[1]}/{cached[2]}"
    text = path.as_posix()
    if _REPOSITORY.fullmatch(text) and not path.exists():
        return text
    return (path if path.name else path.absolute()).name or None


def common_licence(inputs: Sequence[CardInput]) -> Licence:
    """Return the licence that all inputs have by their own cards; none where one is silent or they contradict."""
    stated = {source.name: _licence_fields(source.path) for source in inputs}
    silent = [name for name, fields in stated.items() if not fields]
    distinct = {tuple(sorted(fields.items())) for fields in stated.values() if fields}
    if not distinct:
        return Licence({}, "No card of the inputs states a licence, so none is stated here.")
    if len(distinct) > 1:
        named = ", ".join(f"{_one(name)}: {_one(fields['license'])}" for name, fields in stated.items() if fields)
        return Licence({}, f"The inputs have different licences ({named}), so none is stated here.")
    if silent:
        names = ", ".join(map(_one, silent))
        return Licence({}, f"Not all inputs state a licence (silent: {names}), so none is stated here.")
    fields = dict(distinct.pop())
    return Licence(fields, f"The licence is that of the inputs by their cards: {_one(fields['license'])}.")


def without_folders(text: str, paths: Sequence[Path | None]) -> str:
    """Return a text in which inputs are called by their names, and no absolute path has its folders."""
    for path in sorted((p for p in paths if p is not None), key=lambda p: -len(str(p))):
        text = text.replace(str(path), path.name or str(path))
    return _FOLDERS.sub("", text)


def _licence_fields(path: Path | None) -> dict[str, str]:
    """What the head of an input's card says of its licence; empty if there is no card, or none that can be read."""
    if path is None:
        return {}
    card = (path if path.is_dir() else path.parent) / CARD
    try:
        if not card.is_file() or card.stat().st_size > _MOST_BYTES:
            return {}
        text = read_whole(card).decode("utf-8", "replace")
    except (LoraToolsError, OSError):
        return {}
    head = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text.lstrip("\ufeff"), re.DOTALL)
    if head is None:
        return {}
    import yaml  # type: ignore[import-untyped]

    try:
        document = yaml.safe_load(head[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(document, Mapping) or not isinstance(document.get("license"), str):
        return {}
    return {field: document[field] for field in _LICENCE_FIELDS if isinstance(document.get(field), str)}


def _one(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;")[:120]
