"""list: one row for every adapter in some folders, from headers only."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from loratools import formats
from loratools.adapter import Adapter
from loratools.arguments import Positive, checked
from loratools.checkpoints import open_checkpoint
from loratools.errors import LoraToolsError, UsageError
from loratools.execution import runner
from loratools.execution.local import worker_count
from loratools.formats.common.source import open_source
from loratools.ops.common.fingerprint import fingerprint, same_values
from loratools.ops.common.progress import expect
from loratools.ops.inspect.entries import AdapterEntry
from loratools.ops.inspect.sources import FoundSource, Verdict, sources_at
from loratools.ops.inspect.verb import inspect
from loratools.ops.listing.alike import KnownRows, outline_of
from loratools.ops.listing.catalogue import Catalogue, Outcome, default_path, stamp
from loratools.ops.listing.condition import condition
from loratools.ops.listing.rows import Duplicates, ListedAdapter, ListReport, OtherSource
from loratools.ops.listing.same_files import main_file, same_files
from loratools.ops.listing.summary import modified_at, row_of_adapter, row_of_error
from loratools.sources.local import local_path
from loratools.storage.files import quoted
from loratools.storage.origins import origin_of, shown

_Unit = TypeVar("_Unit")

# The columns that conditions and `sort` accept, and their values.
_OF_NUMBERS = frozenset({"modules", "rank", "alpha", "scale", "parameters", "bytes"})
_OF_SEVERAL = frozenset({"trigger_words", "warnings"})
COLUMNS: dict[str, type] = {
    "name": str,
    **{
        field.name: float if field.name in _OF_NUMBERS else tuple if field.name in _OF_SEVERAL else str
        for field in dataclasses.fields(ListedAdapter)
        if field.name != "ranks"
    },
}


@checked
def list_adapters(
    *folders: str | Path,
    where: str | None = None,
    sort: str | None = None,
    duplicates: bool = False,
    values: bool = False,
    cache: bool = True,
    threads: Positive | None = None,
    execution: Literal["local", "forked"] = "local",
    progress: Callable[[int], None] | None = None,
) -> ListReport:
    """List every adapter in some folders, one row each, from headers only.

    Folders are searched with all their subfolders. A file that several links lead to has one row.

    Args:
        folders: Folders, or single adapters.
        where: A condition on columns: `"rank >= 32 and family = flux and not title ~ '*test*'"`. Text comparison
            ignores case, `~` matches a glob, and sizes may be written as 200MB.
        sort: The column to sort by; `-bytes` sorts by size, largest first. None sorts by path.
        duplicates: Also look for adapters that are the same file, by SHA-256.
        values: With `duplicates`, also look for adapters whose updates are equal up to rounding under other names,
            formats or dtypes. This reads the files.
        cache: Keep what was read in the user's cache folder, and read only files that changed since.
        threads: How many files are read at once; one per CPU if None.
        execution: `local` uses threads of this process. `forked` uses processes: it is faster, needs Linux, and the
            calling program must have no other threads.
        progress: Called with the number of files read since the last call. If it has a method `expect`, that method is
            called first, with the total.

    Returns:
        A report with one row per adapter, and a list of the other files in the folders.

    Raises:
        UsageError: A folder does not exist, or the condition or the column is invalid.

    Example:
        >>> import loratools
        >>> report = loratools.list_adapters("fixtures", where="base_model ~ '*llama*' and rank > 8", cache=False)
        >>> [adapter.name for adapter in report.adapters]
        ['llama-tiny-science']
    """
    meets = condition(where, COLUMNS) if where is not None else lambda row: True
    order = _Order.of(sort)
    if values and not duplicates:
        raise UsageError("values are read to find duplicates", hint="add --duplicates (duplicates=True)")
    paths = [local_path(folder) for folder in folders]
    missing = [str(path) for path in paths if not os.path.lexists(path)]
    if missing or not folders:
        raise UsageError(
            f"{quoted(missing[0])} does not exist" if missing else "no folder is given", details=missing[1:]
        )

    reading = _Reading(Catalogue(default_path() if cache else None), execution, worker_count(threads), progress)
    outcomes = [outcome for path in paths for outcome in reading.outcomes(path)]
    outcomes = list(_one_for_each_file(outcomes))
    adapters = [outcome for outcome in outcomes if isinstance(outcome, ListedAdapter)]
    listed = [adapter for adapter in adapters if meets({**vars(adapter), "name": adapter.name})]
    groups, not_compared = reading.duplicates(listed, values=values) if duplicates else ([], [])
    return ListReport(
        adapters=tuple(dataclasses.replace(adapter, path=shown(adapter.path)) for adapter in order.sorted(listed)),
        others=tuple(dataclasses.replace(o, path=shown(o.path)) for o in outcomes if isinstance(o, OtherSource)),
        duplicates=tuple(dataclasses.replace(group, paths=tuple(map(shown, group.paths))) for group in groups),
        hidden=len(adapters) - len(listed),
        not_compared=tuple(map(shown, not_compared)),
    )


class _Order(NamedTuple):
    """The column to sort by, and whether the order is descending."""

    column: str | None = None
    falling: bool = False

    @classmethod
    def of(cls, text: str | None) -> _Order:
        if text is None:
            return cls()
        column = text.removeprefix("-")
        if column not in COLUMNS:
            raise UsageError(f"there is no column '{column}' to sort by", hint=f"columns are: {', '.join(COLUMNS)}")
        return cls(column, text.startswith("-"))

    def sorted(self, adapters: Sequence[ListedAdapter]) -> list[ListedAdapter]:
        """Sorted by the column; rows without a value there come last."""
        column = self.column
        if column is None:
            return list(adapters)
        keyed = [(getattr(adapter, column), adapter) for adapter in adapters]
        filled = [(_key(value), adapter) for value, adapter in keyed if value not in (None, (), "")]
        empty = [adapter for value, adapter in keyed if value in (None, (), "")]
        return [adapter for _, adapter in sorted(filled, key=lambda pair: pair[0], reverse=self.falling)] + empty


def _key(value: object) -> tuple[float, str]:
    return (float(value), "") if isinstance(value, int | float) else (0.0, str(value).casefold())


class _Examined(NamedTuple):
    """Whether a file is an adapter, and its row; if there is no row, the verdict says why."""

    verdict: Verdict
    outcome: Outcome | None


class _Reading:
    """Reads the entries of folders, unless the catalogue has them already."""

    def __init__(
        self, catalogue: Catalogue, execution: str, threads: int, progress: Callable[[int], None] | None
    ) -> None:
        self._catalogue = catalogue
        self._run_units = runner(execution)
        self._threads = threads
        self._progress = progress
        self._outcomes: dict[str, Outcome] = {}

    def outcomes(self, folder: Path) -> list[Outcome]:
        """The files and folders at and below a path, in natural order."""
        try:
            search = sources_at(folder, None, decide=self._decide)
        except (LoraToolsError, OSError) as error:
            return [row_of_error(str(folder), error, None)]
        self._read([s for s in search.sources if s.error is None and str(s.path) not in self._outcomes])
        outcomes: list[Outcome] = []
        for source in search.sources:
            if source.error is None:
                outcomes.append(self._outcomes[str(source.path)])
            else:
                outcomes.append(row_of_error(str(source.path), source.error, modified_at(source.path)))
        others = [OtherSource(path, group.why) for group in search.not_listed for path in group.paths]
        return [*outcomes, *others]

    def duplicates(self, adapters: Sequence[ListedAdapter], *, values: bool) -> tuple[list[Duplicates], list[str]]:
        """Groups of adapters with the same effect, each path in at most one group; and those whose values cannot be
        compared.
        """
        paths = [adapter.path for adapter in adapters if adapter.error is None]
        same = same_files(paths)
        groups = [Duplicates(group, "file") for group in same]
        if not values:
            return groups, []
        # One of several equal files is enough.
        copies = {path for group in same for path in group[1:]}
        single = [path for path in paths if path not in copies]
        expect(self._progress, len(single))
        files = [Path(path) for path in single]
        sums = self._run_units(files, fingerprint, threads=self._threads, on_result=self._advance)
        known = {path: each for path, each in zip(single, sums, strict=True) if each is not None}
        groups += [Duplicates(group, "values") for group in same_values(known)]
        return groups, [path for path in single if path not in known]

    def _decide(self, paths: Sequence[Path]) -> list[Verdict]:
        stamps = _stamps(paths)
        self._outcomes |= self._catalogue.known(stamps)
        unknown = [path for path in paths if str(path) not in self._outcomes]
        verdicts = dict(zip(unknown, self._run(unknown, _examined_file, stamps), strict=True))
        return [
            verdicts[path].verdict if path in verdicts else isinstance(self._outcomes[str(path)], ListedAdapter)
            for path in paths
        ]

    def _read(self, sources: Sequence[FoundSource]) -> None:
        stamps = _stamps([source.path for source in sources])
        self._outcomes |= self._catalogue.known(stamps)
        self._run([s for s in sources if str(s.path) not in self._outcomes], _examined, stamps)

    def _run(
        self, units: Sequence[_Unit], examine: Callable[[_Unit], _Examined], stamps: dict[str, str]
    ) -> list[_Examined]:
        expect(self._progress, len(units))
        examined: list[_Examined] = self._run_units(units, examine, threads=self._threads, on_result=self._advance)
        outcomes = [each.outcome for each in examined if each.outcome is not None]
        self._outcomes |= {outcome.path: outcome for outcome in outcomes}
        self._catalogue.keep(outcomes, stamps)
        return examined

    def _advance(self, unit: object, result: object) -> None:
        if self._progress is not None:
            self._progress(1)


def _stamps(paths: Iterable[Path]) -> dict[str, str]:
    # The catalogue is shared by all folders that were ever listed; the temporary one of an address is no such folder.
    return {str(path): text for path in paths if origin_of(path) is None and (text := stamp(path)) is not None}


# Of this process: each worker has its own.
_known_rows = KnownRows()


def _examined_file(path: Path) -> _Examined:
    """The kind of a file whose name does not show it. The file is opened once, to detect its format."""
    outline = outline_of(path)
    if outline is not None and (row := _known_rows.row(outline, path, modified_at(path))) is not None:
        return _Examined(True, row)
    try:
        source = open_source(path)
        claims = formats.claims_of(source)
        if len(claims) == 1:
            examined = _of_adapter(path, lambda: formats.load_source(source, format=claims[0]))
            if outline is not None and isinstance(examined.outcome, ListedAdapter):
                _known_rows.keep(outline, examined.outcome, source.tensors.values())
            return examined
        shaped = bool(claims) or formats.has_spelled_parts(source)
    except (LoraToolsError, OSError) as error:
        return _Examined(error, None)
    return _of_adapter(path, lambda: formats.load(path)) if shaped else _of_checkpoint(path)


def _examined(source: FoundSource) -> _Examined:
    path = source.path
    return _of_adapter(path, lambda: formats.load(path)) if source.is_adapter else _of_checkpoint(path)


def _of_adapter(path: Path, load: Callable[[], Adapter]) -> _Examined:
    modified = modified_at(path)
    try:
        # Loaded here, because `inspect` would have to detect the format again.
        entry = inspect(load()).sources[0]
    except (LoraToolsError, OSError) as error:
        return _Examined(True, row_of_error(str(path), error, modified))
    assert isinstance(entry, AdapterEntry)
    return _Examined(True, row_of_adapter(entry._replace(path=str(path)), modified))


def _of_checkpoint(path: Path) -> _Examined:
    try:
        return _Examined(False, OtherSource(str(path), f"{open_checkpoint(path).layout} checkpoint"))
    except (LoraToolsError, OSError) as error:
        return _Examined(True, row_of_error(str(path), error, modified_at(path)))


def _one_for_each_file(outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """Each outcome once: for adapters that are one file by links, the first, and a line for each other."""
    first_paths: dict[object, str] = {}
    for outcome in outcomes:
        try:
            status = main_file(Path(outcome.path)).stat()
            key: object = (status.st_dev, status.st_ino) if status.st_ino else outcome.path
        except OSError:
            key = outcome.path
        first = first_paths.setdefault(key, outcome.path)
        if first == outcome.path:
            yield outcome
        else:
            yield OtherSource(outcome.path, f"the same file as {first}")
