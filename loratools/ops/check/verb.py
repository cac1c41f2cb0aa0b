"""check: find what is wrong with adapters and models, by rules with stable ids."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from loratools import checks
from loratools.arguments import Positive, checked
from loratools.checkpoints import open_checkpoint
from loratools.checks.common.programs import program as program_named
from loratools.checks.common.subject import Subject
from loratools.errors import ChangedInputError, InputError, UsageError
from loratools.execution import runner
from loratools.execution.local import worker_count
from loratools.formats import Base
from loratools.formats.common.opened_base import known_base
from loratools.ops.check.asking import Answers, answers, in_order
from loratools.ops.check.baseline import baseline_of, known_findings, refuse_other_file, without_known
from loratools.ops.check.reading import GivenContext, read_subject
from loratools.ops.check.report import CheckedSource, CheckReport, NotChecked
from loratools.ops.common.fingerprint import same_values
from loratools.ops.common.progress import expect
from loratools.ops.inspect.sources import FoundSource, sources_at
from loratools.sources.local import local_path
from loratools.storage.commit import replaced_file
from loratools.storage.files import quoted
from loratools.storage.held_inputs import holding_inputs
from loratools.storage.json_file import write_json
from loratools.storage.origins import shown

if TYPE_CHECKING:
    from loratools.checkpoints import Checkpoint

# Measurements that rules need and that only values can give.
_OF_VALUES = frozenset({"values"})
_OF_OTHERS = frozenset({"numerics-duplicate"})


@checked(Checkpoint="loratools.checkpoints")
def check(
    *sources: str | Path,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    base: str | Path | Checkpoint | Base | None = None,
    program: str | None = None,
    values: bool = True,
    from_format: str | None = None,
    baseline: str | Path | None = None,
    write_baseline: str | Path | None = None,
    threads: Positive | None = None,
    execution: Literal["local", "forked"] = "local",
    progress: Callable[[int], None] | None = None,
) -> CheckReport:
    """Check adapters and models by rules with stable ids, and return what is wrong with them.

    Folders are searched with all their subfolders. A file that cannot be read becomes a finding; it does not raise an
    error.

    Args:
        sources: Files or folders.
        select: Ids of rules, or families of rules, to apply; empty applies all.
        ignore: Ids of rules, or families of rules, that are not applied.
        base: The base model of the adapters: a path, an opened checkpoint, or a `Base`. With it, rules also check that
            the adapters fit the base and how much of their change rounding to its dtype loses.
        program: The program that will load the adapters: vllm, sglang, tgi, lorax, tensorrt-llm, comfyui, diffusers,
            llama.cpp, mlx or peft. With it, rules also report what that program does not load.
        values: Also read the values, to find NaN and infinite values, updates that are zero, lost rows and duplicates.
            If False, only headers are read.
        from_format: The format of the adapters; detected from the content if None.
        baseline: A file of known findings. They are counted, and left out of `findings`.
        write_baseline: Where to write a baseline file with all findings. Only another baseline is replaced.
        threads: How many sources are read at once; one per CPU if None.
        execution: `local` uses threads of this process. `forked` uses processes: it is faster, needs Linux, and the
            calling program must have no other threads.
        progress: Called with the number of sources checked since the last call. If it has a method `expect`, that
            method is called first, with the total.

    Returns:
        A report with one entry per source. A folder of several adapters has one entry for each adapter, model and
        broken file below it.

    Raises:
        UsageError: A path does not exist, or there is no rule of that name.
        OutputExistsError: `write_baseline` exists and is not a baseline.

    Example:
        >>> import loratools
        >>> report = loratools.check("fixtures/llama-tiny-science")
        >>> report.exit_code
        0
    """
    rules = checks.selected(select, ignore)
    missing = [str(source) for source in sources if not os.path.lexists(local_path(source))]
    if missing or not sources:
        raise UsageError(
            f"{quoted(missing[0])} does not exist" if missing else "no source is given", details=missing[1:]
        )
    known = known_findings(Path(baseline)) if baseline is not None else None
    if write_baseline is not None:
        refuse_other_file(Path(write_baseline))
    needs = {checks.rule(id).NEEDS for id in rules} if values else set[str]()
    if program is not None:
        program_named(program)
    units = [unit for source in sources for unit in _units_at(source, from_format)]
    compares = "others" in needs and sum(map(_is_readable_adapter, units)) > 1
    expect(progress, len(units))
    run = partial(runner(execution), threads=worker_count(threads))
    with holding_inputs():
        work = partial(
            _checked,
            context=_context(base, program, from_format),
            rules=frozenset(rules),
            values=bool(needs & _OF_VALUES),
            gains="numerics-gain" in rules and values,
            compares=compares,
        )
        results: Sequence[_Result] = run(
            units, work, on_result=lambda unit, result: progress(1) if progress is not None else None
        )
    checked_sources = _with_duplicates(units, results)
    if write_baseline is not None:
        with replaced_file(Path(write_baseline)) as staged:
            write_json(staged, baseline_of(checked_sources, Path(write_baseline)))
    if known is not None:
        checked_sources = tuple(without_known(checked_sources, Path(str(baseline)), known))
    return CheckReport(tuple(checked_sources), rules)


def _context(base: str | Path | Checkpoint | Base | None, program: str | None, format: str | None) -> GivenContext:
    """The arguments of a check, with the base opened once for all sources, and read if it has values."""
    known = known_base(base)
    checkpoint = None if base is None or isinstance(base, str | Path | Base) else base
    if known is not None and known.shapes and known.path is not None and checkpoint is None:
        checkpoint = open_checkpoint(known.path)
    return GivenContext(known, program, format, checkpoint)


class _Unit(NamedTuple):
    """One source, and the path that reports call it by: spelled as it was given, so that scripts can look it up."""

    found_source: FoundSource
    shown: str


def _units_at(source: str | Path, format: str | None) -> list[_Unit]:
    path = local_path(source)
    try:
        found_sources = sources_at(path, format).sources
    except InputError as error:
        # The file is so damaged that its format cannot be determined.
        found_sources = (FoundSource(path, is_adapter=False, error=error),)
    return [_Unit(each, str(source) if each.path == path else shown(each.path)) for each in found_sources]


def _is_readable_adapter(unit: _Unit) -> bool:
    return unit.found_source.is_adapter and unit.found_source.error is None


class _Result(NamedTuple):
    """A checked source, and its fingerprint if it is compared with other sources and has one."""

    source: CheckedSource
    sums: tuple[float, ...] | None = None


def _checked(
    unit: _Unit, *, context: GivenContext, rules: frozenset[str], values: bool, gains: bool, compares: bool
) -> _Result:
    try:
        # A source that changes during the check is a finding, like one that cannot be read.
        with holding_inputs(apart=True):
            subject = read_subject(unit.found_source, context)
            base = context.checkpoint if gains else None
            if not (values or compares or base is not None):
                return _Result(_reported(unit.shown, answers(subject, rules)))
            from loratools.ops.check.measuring import measured

            result = measured(subject, base=base, compares=compares)
            answered = answers(result.subject, rules)
    except ChangedInputError as error:
        return _Result(_reported(unit.shown, answers(Subject(unit.found_source.path, error=error), rules)))
    return _Result(_reported(unit.shown, answered, result.not_checked), result.sums)


def _reported(path: str, answered: Answers, not_measured: tuple[NotChecked, ...] = ()) -> CheckedSource:
    return CheckedSource(path, answered.findings, not_checked=(*answered.not_checked, *not_measured))


def _with_duplicates(units: Sequence[_Unit], results: Sequence[_Result]) -> Sequence[CheckedSource]:
    """The sources, with findings that need all of them: which adapters make the same change."""
    sums_of = {str(u.found_source.path): r.sums for u, r in zip(units, results, strict=True) if r.sums is not None}
    groups = same_values(sums_of)
    twins = {path: tuple(Path(each) for each in group if each != path) for group in groups for path in group}
    return [
        _with_twins(result.source, unit.found_source.path, twins.get(str(unit.found_source.path), ()))
        for unit, result in zip(units, results, strict=True)
    ]


def _with_twins(source: CheckedSource, path: Path, twins: tuple[Path, ...]) -> CheckedSource:
    of_others = answers(Subject(path, twins=twins), _OF_OTHERS).findings
    return replace(source, findings=in_order([*source.findings, *of_others]))
