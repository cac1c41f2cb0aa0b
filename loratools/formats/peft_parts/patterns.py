"""Which key of `rank_pattern` or `alpha_pattern` PEFT takes for a module, without ever being held up by a regex.

The keys are regular expressions from an untrusted file. PEFT takes the first one, in their order, that matches the
module's name as `(.*\\.)?(KEY)$`; if none does, a key that is literally the name still counts
(`peft.utils.other.get_pattern_key`). Keys of fixed length are looked up without a regex engine; all others share the
time budget of their file.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loratools.storage.untrusted_regex import UntrustedRegexes


def matches(keys: Iterable[str], regexes: UntrustedRegexes, *, subject: str) -> dict[str, tuple[str, ...]]:
    """For every name the keys that match it, in their order: PEFT takes the first.

    Args:
        keys: Those of a `rank_pattern` or `alpha_pattern`.
        regexes: The names, and the time that is left for the patterns of their file.
        subject: Begins the messages of errors.

    Raises:
        FormatError: A key is no regular expression, or they take too long to match.
    """
    keys = list(keys)
    fixed = {index: text for index, key in enumerate(keys) if (text := _fixed(key)) is not None}
    literal = _Literals(fixed)
    regex_keys = [(index, key) for index, key in enumerate(keys) if index not in fixed]
    hits: dict[str, list[int]] = {name: [] for name in regexes.names}
    matched = regexes.match([key for _, key in regex_keys], subject=subject, around=(r"(.*\.)?(", ")$"))
    for (index, _), names in zip(regex_keys, matched, strict=True):
        for name in names:
            hits[name].append(index)

    literally = set(keys)
    keys_by_name: dict[str, tuple[str, ...]] = {}
    started = time.thread_time()
    for name, indices in hits.items():
        every = {*indices, *literal.hits(name)}
        keys_by_name[name] = tuple(keys[i] for i in sorted(every)) or ((name,) if name in literally else ())
        now = time.thread_time()
        regexes.charge(now - started, subject=subject, count=len(keys))
        started = now
    return keys_by_name


@dataclass(frozen=True)
class _Fixed:
    """A key that matches strings of one length: its text, where any character may stand, and whether `^` begins it."""

    text: str
    anywhere: tuple[int, ...]
    anchored: bool


_ESCAPED = frozenset("\\.-+*?()[]{}|^$#&~ /_:,;<>=@!%'\"`")
_PLAIN = re.compile(r"[\w\- /:,;<>=@!%'\"`&~#]")


def _fixed(key: str) -> _Fixed | None:
    body = key.removeprefix("^")
    text: list[str] = []
    anywhere: list[int] = []
    at = 0
    while at < len(body):
        character = body[at]
        if character == "\\" and at + 1 < len(body) and body[at + 1] in _ESCAPED:
            at += 1
            character = body[at]
        elif character == ".":
            anywhere.append(len(text))
        elif not _PLAIN.match(character):
            return None
        text.append(character)
        at += 1
    return _Fixed("".join(text), tuple(anywhere), key.startswith("^")) if text else None


class _Literals:
    """Fixed keys, by length and by the places where any character may stand: a look-up for each such group."""

    def __init__(self, fixed: Mapping[int, _Fixed]) -> None:
        self._groups: dict[int, dict[tuple[tuple[int, ...], bool], dict[str, int]]] = {}
        for index, key in sorted(fixed.items()):
            group = self._groups.setdefault(len(key.text), {}).setdefault((key.anywhere, key.anchored), {})
            # Two spellings of one key: the later one is never taken.
            group.setdefault(key.text, index)

    def hits(self, name: str) -> set[int]:
        indices: set[int] = set()
        # `$` also matches before a line break at the end.
        ends = [name, name[:-1]] if name.endswith("\n") else [name]
        for text in ends if self._groups else ():
            for start in _starts(text):
                for (anywhere, anchored), group in self._groups.get(len(text) - start, {}).items():
                    index = group.get(_masked(text[start:], anywhere))
                    if index is not None and not (anchored and start):
                        indices.add(index)
        return indices


def _starts(name: str) -> list[int]:
    """Where KEY may begin in `(.*\\.)?(KEY)$`: at the name's start and after each dot, but `.` passes no line break."""
    line_end = name.find("\n")
    return [0, *(i + 1 for i, c in enumerate(name) if c == "." and (line_end < 0 or i < line_end))]


def _masked(text: str, anywhere: tuple[int, ...]) -> str:
    if all(text[i] == "." for i in anywhere):
        return text
    characters = list(text)
    for i in anywhere:
        if characters[i] != "\n":
            characters[i] = "."
    return "".join(characters)
