"""Verification of the files of an output against its own record.

The record (`loratools.json`) has the size and the SHA-256 of every file. Large weight files of a merge have a full hash
only if `manifest` was set; for the others, the size and 64 pieces spread over the file are compared.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from loratools.arguments import Positive, checked
from loratools.errors import InputError, UsageError
from loratools.execution.local import run, worker_count
from loratools.notebook_html import notebook_html
from loratools.ops.common.progress import expect
from loratools.ops.verify.report import EXIT_CODES, Finding, Verdict
from loratools.short_repr import few_lines, one_line
from loratools.storage import system
from loratools.storage.files import fingerprint, identify, is_sampled_whole, quoted, sha256
from loratools.storage.held_inputs import holding_inputs
from loratools.storage.ownership import RECORD, entries_below, recorded_files

FileState: TypeAlias = Literal["same", "sampled", "changed", "truncated", "missing", "extra"]
_MESSAGES: Mapping[FileState, tuple[str, str]] = {
    "changed": ("file-changed", "files that are not what was written"),
    "truncated": ("file-truncated", "files that are shorter than what was written"),
    "missing": ("file-missing", "files that no longer exist"),
    "extra": ("file-extra", "files that loratools did not write"),
    "sampled": ("sampled", "of these files only pieces are recorded, and compared: merge with --manifest for all"),
}


@dataclass(frozen=True)
class CheckedFile:
    """A file of an output, compared with its record.

    Attributes:
        name: Its name in the folder.
        state: `same`; `sampled` if only the recorded pieces were compared, and they are the same; `changed`;
            `truncated`; `missing`; `extra` if the record does not have it.
        bytes: Its size; None if it is missing.
        recorded_bytes: Its recorded size; None if it is not in the record.
        sha256: Its SHA-256 hash, if all of the file was compared; else None.
    """

    name: str
    state: FileState
    bytes: int | None = None
    recorded_bytes: int | None = None
    sha256: str | None = None

    def __repr__(self) -> str:
        return one_line(self)

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `files` in the document of `loratools verify --files --json`."""
        return dict(vars(self))


@dataclass(frozen=True)
class FilesReport:
    """The report of a verification of files.

    Attributes:
        merged: The folder that was verified.
        verdict: `same`, `different`, or `undecided` if only pieces of some files could be compared.
        diagnosis: What is wrong or cannot be decided; empty if nothing is.
        files: Every file, sorted by name.
        seconds: Wall-clock time in seconds.

    Example:
        >>> import loratools
        >>> _ = loratools.resize("fixtures/llama-tiny-science", "rank-3", rank=3)
        >>> report = loratools.verify_files("rank-3")
        >>> report.verdict, report.exit_code
        ('same', 0)
    """

    merged: Path
    verdict: Verdict
    diagnosis: tuple[Finding, ...]
    files: tuple[CheckedFile, ...]
    seconds: float

    def __repr__(self) -> str:
        return few_lines(self)

    _repr_html_ = notebook_html

    @property
    def exit_code(self) -> int:
        """The exit code of the verdict: 0 for `same`, 1 for `different`, 3 for `undecided`."""
        return EXIT_CODES[self.verdict]

    def rows(self) -> list[dict[str, object]]:
        """Return one row per file, for a data frame: `pandas.DataFrame(report.rows())`."""
        return [file.to_dict() for file in self.files]

    def to_dict(self) -> dict[str, object]:
        """Return the document of `loratools verify --files --json`, without the fields common to all verbs."""
        return {
            "merged": str(self.merged),
            "verdict": self.verdict,
            "diagnosis": [finding.to_dict() for finding in self.diagnosis],
            "files": self.rows(),
            "seconds": self.seconds,
        }


@checked
@holding_inputs()
def verify_files(
    merged: str | Path, *, threads: Positive | None = None, progress: Callable[[int], None] | None = None
) -> FilesReport:
    """Check that the files of an output are unchanged since loratools wrote them, and that none is missing or extra.

    Args:
        merged: A folder that loratools wrote: a merged model or an adapter.
        threads: How many files are hashed at once; one per CPU if None.
        progress: Called with the number of bytes compared since the last call.

    Returns:
        A report with a verdict: `same`, `different` or `undecided`.

    Raises:
        UsageError: The folder does not exist, or is a file.
        InputError: The folder has no record, or the record cannot be read.
        MachineError: A file cannot be read.

    Example:
        >>> import loratools
        >>> _ = loratools.resize("fixtures/llama-tiny-science", "smaller-to-verify", rank=2)
        >>> loratools.verify_files("smaller-to-verify").verdict
        'same'
    """
    began = time.monotonic()
    folder = Path(merged)
    recorded = _recorded(folder)
    present = {name for name, is_folder in entries_below(folder) if not is_folder and name != RECORD}
    expect(progress, sum(_size(recorded[name]) for name in recorded.keys() & present))
    report_bytes = progress or (lambda _: None)
    checked_files = run(
        sorted(recorded.keys() | present),
        lambda name: _checked(folder, name, recorded.get(name), name in present),
        threads=worker_count(threads),
        on_result=lambda _, file: report_bytes(file.bytes or 0),
    )
    findings = _findings(checked_files)
    wrong = any(not finding.undecided for finding in findings)
    verdict: Verdict = "different" if wrong else "undecided" if findings else "same"
    report = FilesReport(folder, verdict, tuple(findings), tuple(checked_files), 0.0)
    return replace(report, seconds=round(time.monotonic() - began, 3))


def _recorded(folder: Path) -> Mapping[str, Mapping[str, object]]:
    if not folder.is_dir():
        if system.exists(folder):
            raise UsageError(
                f"{quoted(folder)} is one file, which has no record of its files beside it",
                hint="name the folder of an output; a merged file is held against its inputs with --base BASE ADAPTER",
            )
        raise UsageError(f"{quoted(folder)} does not exist")
    recorded = recorded_files(folder)
    if recorded is None:
        raise InputError(
            f"{quoted(folder)} has no record of what was written ('{RECORD}'), or one that cannot be read",
            hint="only what loratools wrote has one; other merged models are held against --base BASE ADAPTER[=W]...",
        )
    return recorded


def _size(entry: Mapping[str, object]) -> int:
    size = entry.get("bytes")
    return size if isinstance(size, int) else 0


def _checked(folder: Path, name: str, entry: Mapping[str, object] | None, is_there: bool) -> CheckedFile:
    if entry is None:
        return CheckedFile(name, "extra", system.lstat(folder / name).st_size)
    size = _size(entry)
    if not is_there:
        return CheckedFile(name, "missing", None, size)
    file = identify(folder / name)
    if file.size != size:
        return CheckedFile(name, "truncated" if file.size < size else "changed", file.size, size)
    expected = entry.get("sha256")
    if expected is not None:
        digest = sha256(folder / name)
        return CheckedFile(name, "same" if digest == expected else "changed", size, size, digest)
    if fingerprint(file) != entry.get("digest"):
        return CheckedFile(name, "changed", size, size)
    return CheckedFile(name, "same" if is_sampled_whole(file) else "sampled", size, size)


def _findings(files: list[CheckedFile]) -> list[Finding]:
    """One finding for each state, with all the files in that state."""
    names: dict[FileState, list[str]] = defaultdict(list)
    for file in files:
        names[file.state].append(file.name)
    return [
        Finding(code, message, tuple(names[state]), undecided=state == "sampled")
        for state, (code, message) in _MESSAGES.items()
        if names[state]
    ]
