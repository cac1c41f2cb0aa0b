"""Which key of `rank_pattern` or `alpha_pattern` PEFT takes for a module, without ever being held up by a regex.

The keys are regular expressions from a stranger's file. PEFT takes the first, in their order, that matches the
module's name as `(.*\\.)?(KEY)$`; where none does, a key that is literally the name still counts
(`peft.utils.other.get_pattern_key`). Keys of fixed length are looked up without a regex engine; those in which nothing
repeats are run here; any other is run in a process of its own, which is stopped after a while: some take years.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loratools.errors import FormatError, MachineError
from loratools.storage.files import quoted

TIMEOUT_SECONDS = 2.0


def matches(keys: Iterable[str], names: Sequence[str], *, where: str) -> dict[str, tuple[str, ...]]:
    """For every name the keys that match it, in their order: PEFT takes the first. `where` begins the error messages.

    Raises:
        FormatError: a key is no regular expression, or takes too long to match.
    """
    keys = list(keys)
    fixed = {index: found for index, key in enumerate(keys) if (found := _fixed(key)) is not None}
    literal = _Literals(fixed)
    others = [(index, key) for index, key in enumerate(keys) if index not in fixed]
    matched = _match_here([(i, key) for i, key in others if _is_bounded(key)], names, where)
    matched |= _match_apart([(i, key) for i, key in others if not _is_bounded(key)], names, where)

    literally = set(keys)
    found_for: dict[str, tuple[str, ...]] = {}
    for name in names:
        hits = literal.hits(name).union(i for i, _ in others if name in matched[i])
        found_for[name] = tuple(keys[i] for i in sorted(hits)) or ((name,) if name in literally else ())
    return found_for


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
        found: set[int] = set()
        # `$` also matches before a line break at the end.
        ends = [name, name[:-1]] if name.endswith("\n") else [name]
        for text in ends if self._groups else ():
            for start in _starts(text):
                for (anywhere, anchored), group in self._groups.get(len(text) - start, {}).items():
                    index = group.get(_masked(text[start:], anywhere))
                    if index is not None and not (anchored and start):
                        found.add(index)
        return found


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


# Nothing repeats, and so few alternatives that even all of their combinations are soon tried.
_BOUNDED = re.compile(r"[\w.\-()|^$\[\]\\]{0,500}")
_MOST_ALTERNATIVES = 6


def _is_bounded(key: str) -> bool:
    return _BOUNDED.fullmatch(key) is not None and key.count("|") <= _MOST_ALTERNATIVES and key.count("(") <= 20


def _match_here(keys: Sequence[tuple[int, str]], names: Sequence[str], where: str) -> dict[int, set[str]]:
    matched: dict[int, set[str]] = {}
    for index, key in keys:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a set inside a set may mean something else one day
                pattern = re.compile(rf"(.*\.)?({key})$")
        except (re.error, RecursionError, OverflowError) as error:
            raise _no_regex(key, str(error), where) from None
        matched[index] = {name for name in names if pattern.match(name)}
    return matched


# Says which key it is at before it begins with it, so that one that never ends can be named.
_CHILD = r"""
import json, re, sys, warnings
warnings.simplefilter("ignore")
keys, names = json.load(sys.stdin)
for index, key in keys:
    print(json.dumps([index]), flush=True)
    try:
        pattern = re.compile(r"(.*\.)?(" + key + r")$")
        answer = [i for i, name in enumerate(names) if pattern.match(name)]
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        answer = str(error) or type(error).__name__
    print(json.dumps([index, answer]), flush=True)
"""


def _match_apart(keys: Sequence[tuple[int, str]], names: Sequence[str], where: str) -> dict[int, set[str]]:
    if not keys:
        return {}
    import subprocess  # 10 ms, and hardly ever needed

    if not sys.executable:
        raise MachineError("could not start a Python of its own for the regular expressions of an adapter")
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        output, _ = child.communicate(json.dumps([keys, names]).encode(), timeout=TIMEOUT_SECONDS)
        overtime = False
    except subprocess.TimeoutExpired:
        child.kill()
        output, _ = child.communicate()
        overtime = True
    by_index = dict(keys)
    matched: dict[int, set[str]] = {}
    begun = keys[0][0]
    # The last line is cut off where the process was stopped in the middle of it.
    for line in output.decode("utf-8", errors="replace").splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        begun, *answer = json.loads(line)
        if answer and isinstance(answer[0], str):
            raise _no_regex(by_index[begun], answer[0], where)
        if answer:
            matched[begun] = {names[i] for i in answer[0]}
    if len(matched) < len(keys):
        why = f"takes more than {TIMEOUT_SECONDS:g} seconds" if overtime else "could not be matched"
        raise FormatError(
            f"{where}: the regular expression {quoted(by_index[begun])} {why} on {len(names)} module names",
            hint="write the names of the modules in its place",
        )
    return matched


def _no_regex(key: str, why: str, where: str) -> FormatError:
    return FormatError(f"{where}: {quoted(key)} is no regular expression: {why}")
