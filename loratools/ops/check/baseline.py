"""A baseline: findings that are known, kept in a file, and not counted again.

A finding is known by its rule, the path of its source and its message. Paths are relative to the folder of the file, so
that a repository can be checked out anywhere.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from loratools._version import __version__
from loratools.errors import FormatError, LoraToolsError, OutputExistsError, UsageError
from loratools.ops.check.report import CheckedSource, CheckFinding
from loratools.storage.files import quoted
from loratools.storage.json_file import read_json

_VERSION = 1
_MOST_BYTES = 100_000_000


class KnownFinding(NamedTuple):
    """What a finding is known again by."""

    path: str
    id: str
    message: str


def known_findings(file: Path) -> Counter[KnownFinding]:
    """The findings in a baseline file, with how often each is there.

    Raises:
        UsageError: There is no such file.
        FormatError: It is no baseline.
    """
    if not file.is_file():
        raise UsageError(f"there is no baseline {quoted(file)}", hint=f"write one: --write-baseline {file}")
    listed = read_json(file, max_bytes=_MOST_BYTES).get("findings")
    if not isinstance(listed, list) or not all(_is_entry(entry) for entry in listed):
        raise FormatError(f"{quoted(file)} is no baseline", hint="write one with --write-baseline")
    return Counter(KnownFinding(entry["path"], entry["id"], entry["message"]) for entry in listed)


def refuse_other_file(file: Path) -> None:
    """Raise OutputExistsError where a baseline would replace something else."""
    if not os.path.lexists(file):
        return
    try:
        known_findings(file)
    except LoraToolsError as error:
        raise OutputExistsError(
            f"{quoted(file)} exists and is no baseline, so that it is not replaced", hint="give another name"
        ) from error


def without_known(
    sources: Iterable[CheckedSource], file: Path, known: Mapping[KnownFinding, int]
) -> Iterator[CheckedSource]:
    """The sources without the findings that the baseline has, each as often as it is there."""
    remaining = Counter(known)
    for source in sources:
        new: list[CheckFinding] = []
        for finding in source.findings:
            key = _key(source, finding, file)
            if remaining[key] > 0:
                remaining[key] -= 1
            else:
                new.append(finding)
        yield replace(source, findings=tuple(new), baselined=len(source.findings) - len(new))


def baseline_of(sources: Iterable[CheckedSource], file: Path) -> dict[str, object]:
    """What a baseline file of these findings holds."""
    keys = sorted(_key(source, finding, file) for source in sources for finding in source.findings)
    return {"loratools": __version__, "baseline_version": _VERSION, "findings": [key._asdict() for key in keys]}


def _key(source: CheckedSource, finding: CheckFinding, file: Path) -> KnownFinding:
    # On another drive there is no relative path.
    try:
        path = Path(os.path.relpath(source.path, file.parent)).as_posix()
    except ValueError:
        path = Path(source.path).absolute().as_posix()
    # A reader's message names the file by the path that was given.
    given_path = str(Path(source.path))
    message = finding.message.replace(given_path, path).replace(str(Path(source.path).parent) + os.sep, "")
    return KnownFinding(path, finding.id, message)


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(field), str) for field in KnownFinding._fields)
