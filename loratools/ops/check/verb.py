"""check: what is wrong with adapters and models, by rules with stable ids."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from loratools import checks
from loratools.arguments import Positive, checked
from loratools.errors import InputError, UsageError
from loratools.execution import forked, local
from loratools.ops.check.asking import findings
from loratools.ops.check.baseline import baseline_of, known_findings, without_known
from loratools.ops.check.reading import GivenContext, read_subject
from loratools.ops.check.report import CheckedSource, CheckReport
from loratools.ops.common.progress import expect
from loratools.ops.inspect.sources import FoundSource, sources_at
from loratools.storage.json_file import write_json


@checked
def check(
    *sources: str | Path,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    from_format: str | None = None,
    baseline: str | Path | None = None,
    write_baseline: str | Path | None = None,
    threads: Positive | None = None,
    execution: Literal["local", "forked"] = "local",
    progress: Callable[[int], None] | None = None,
) -> CheckReport:
    """Return what is wrong with adapters and models, by rules with stable ids.

    Folders are searched to the bottom. A file that cannot be read is a finding, not an error.

    Args:
        sources: Files or folders.
        select: Ids of rules, and families of rules; all are asked where there is none.
        ignore: Ids and families of rules that are not asked.
        from_format: The format of the adapters, where it is not to be found from the content.
        baseline: A file of known findings, which are left out and counted.
        write_baseline: A file to write that holds all findings.
        threads: How many sources are read at once; as many as there are cores where it is not given.
        execution: `local` (threads of this process) or `forked` (processes: faster, for a program without other
            threads, on Linux).
        progress: Called with the number of sources just checked. If it has a method `expect`, that is called with the
            total before.

    Returns:
        A report with one entry per source, and for a folder of several with one for each adapter, model and broken
        file below it.

    Raises:
        UsageError: There is nothing at a path, or no such rule.

    Example:
        >>> import loratools
        >>> report = loratools.check("fixtures/llama-tiny-science")
        >>> report.exit_code
        0
    """
    rules = checks.selected(select, ignore)
    missing = [str(source) for source in sources if not os.path.lexists(source)]
    if missing or not sources:
        raise UsageError(f"'{missing[0]}' does not exist" if missing else "no source is given", details=missing[1:])
    known = known_findings(Path(baseline)) if baseline is not None else None
    context = GivenContext(format=from_format)

    units = [unit for source in sources for unit in _units_at(source, from_format)]
    expect(progress, len(units))
    # The two have one signature; what they return depends on what they are given.
    runner: Any = forked.run if execution == "forked" else local.run
    checked_sources: Sequence[CheckedSource] = runner(
        units,
        partial(_checked, context=context, rules=rules),
        threads=threads or os.cpu_count() or 1,
        on_result=lambda unit, result: progress(1) if progress is not None else None,
    )
    if write_baseline is not None:
        write_json(Path(write_baseline), baseline_of(checked_sources, Path(write_baseline)))
    if known is not None:
        checked_sources = tuple(without_known(checked_sources, Path(str(baseline)), known))
    return CheckReport(tuple(checked_sources), rules)


class _Unit(NamedTuple):
    """One source, and the path to call it by: as it was given, which scripts look up."""

    found_source: FoundSource
    shown: str


def _units_at(source: str | Path, format: str | None) -> list[_Unit]:
    path = Path(source)
    try:
        found_sources = sources_at(path, format).sources
    except InputError as error:
        # A file that is so broken that it is not known what it was to be.
        found_sources = (FoundSource(path, is_adapter=False, error=error),)
    return [_Unit(each, str(source) if each.path == path else str(each.path)) for each in found_sources]


def _checked(unit: _Unit, *, context: GivenContext, rules: Sequence[str]) -> CheckedSource:
    subject = read_subject(unit.found_source, context)
    return CheckedSource(unit.shown, findings(subject, frozenset(rules)))
