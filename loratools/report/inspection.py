"""What `inspect` shows: a panel about the source, then its modules or tensors, alike ones in one row."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from rich.box import ROUNDED
from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from loratools.ops.inspect.entries import (
    AdapterEntry,
    CheckpointEntry,
    Entry,
    FailedEntry,
    InspectedModule,
    InspectReport,
    NotListed,
    QuantisedEntry,
    TensorEntry,
)
from loratools.ops.inspect.training_run import TrainingRun
from loratools.report.groups import Group, grouped
from loratools.report.pictures.of_reports import maps
from loratools.report.rows import Column, Rows
from loratools.report.text import interval, number, plural, safe, shape, size
from loratools.short_repr import clipped

if TYPE_CHECKING:
    from loratools.formats.common.description import Description

_Item = TypeVar("_Item")

# More names than this in one line of a remark help nobody; --json has them all.
_NAMED = 5
# Rows of a table without --modules. A usual model has a few dozen; a file whose names have no pattern has one for each.
_MOST_ROWS = 1000
# Tags that are shown, and characters of what an author wrote.
_TAGS, _LONGEST_TEXT = 8, 200
# Warnings below a table of sources.
_MOST_WARNINGS = 20


def inspection_report(
    inspection: InspectReport, *, modules: bool = False, overview: bool = False
) -> list[RenderableType]:
    """Blocks to print one after the other.

    Args:
        modules: A row for every module or tensor, in place of one for all that are alike.
        overview: One row per source and nothing more, for a folder of many.
    """
    remarks = [("best", best_checkpoint_text(run)) for run in inspection.runs if run.best or run.error]
    remarks += [("not listed", not_listed_text(each)) for each in inspection.not_listed]
    if overview and not modules:
        return [*_overview(inspection.sources), *_remarks([*_marks(inspection.sources), *remarks])]
    blocks: list[RenderableType] = []
    for entry in inspection.sources:
        if blocks:
            blocks.append("")
        blocks.extend(_blocks(entry, modules))
    return [*blocks, *_remarks(remarks)]


def _blocks(entry: Entry, modules: bool) -> Iterator[RenderableType]:
    match entry:
        case AdapterEntry():
            yield _panel(entry.path, adapter_facts(entry))
            if entry.modules:
                yield from _modules(entry.modules, modules)
                yield maps(entry.charts, "Norm of the change", "Rank that keeps", "Singular values")
            if entry.replacements:
                yield ""
                yield from _tensors("replaced weight", entry.replacements, modules)
            yield from _remarks(adapter_remarks(entry))
        case CheckpointEntry():
            yield _panel(entry.path, checkpoint_facts(entry))
            yield from _tensors("tensor", entry.tensors, modules)
            yield from _remarks(checkpoint_remarks(entry))
        case FailedEntry():
            yield _panel(entry.path, [], "red")
            yield from _remarks([("error", entry.error.message)], spaced=False)
            yield from (Text(f"  {safe(line)}") for line in entry.error.details)
            if entry.error.hint:
                yield from _remarks([("hint", entry.error.hint)], spaced=False)


# ── panel ──


def _panel(path: str, facts: Sequence[tuple[str, str]], colour: str = "cyan") -> RenderableType:
    title = Text(safe(path), style=f"bold {colour}")
    if not facts:
        return title
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in facts:
        grid.add_row(key, Text(value))
    # The title is a line of its own: in the frame it would be cut off where it is longer than what is inside.
    body = Table.grid()
    body.add_column(overflow="fold")
    body.add_row(title)
    body.add_row(grid)
    return Panel(body, box=ROUNDED, border_style="dim", expand=False, padding=(0, 1))


def adapter_facts(entry: AdapterEntry) -> list[tuple[str, str]]:
    """Return what an adapter is, in pairs of a word and a text."""
    kinds = " + ".join(sorted({m.kind for m in entry.modules})) or "replaced weights only"
    facts = [("adapter", f"{entry.format} · {kinds}")]
    base = entry.base_model or "not named"
    facts.append(("base model", safe(f"{base} · {entry.family}" if entry.family else base)))
    if entry.description is not None:
        facts += _described(entry.description)
    if entry.modules:
        ranks = interval(m.rank for m in entry.modules)
        scales = interval(m.scale for m in entry.modules)
        facts.append(("modules", f"{len(entry.modules):,} · rank {ranks} · scale {scales}"))
    return [*facts, *_bulk(entry.parameters, entry.dtypes, entry.bytes)]


def _described(description: Description) -> Iterator[tuple[str, str]]:
    """The lines about the description in the header."""
    if description.title:
        yield "title", _shortened(description.title)
    if description.trigger_words:
        yield "trigger words", _shortened(", ".join(description.trigger_words))
    if description.tags:
        shown = ", ".join(f"{tag} ({count:,})" for tag, count in description.tags[:_TAGS])
        more = len(description.tags) - _TAGS
        yield "tags", _shortened(shown) + (f" … and {more:,} more" if more > 0 else "")
    if description.notes:
        yield "notes", _shortened(description.notes)
    amounts = ((description.epochs, "epoch"), (description.steps, "step"))
    trained = [plural(count, word) for count, word in amounts if count is not None]
    trained += [f"pictures of {description.resolution}"] if description.resolution else []
    trained += [description.date] if description.date else []
    if trained:
        yield "trained", safe(" · ".join(trained))
    by = [text for text in (description.author, description.license) if text]
    if by:
        yield "made by", _shortened(" · ".join(by))
    if description.hashes:
        yield "hashes", ", ".join(f"{name} {value}" for name, value in description.hashes.items())


def _shortened(text: str) -> str:
    """The text on one line, cut where a header holds a whole page; --json has all of it."""
    return safe(clipped(text, _LONGEST_TEXT))


def checkpoint_facts(entry: CheckpointEntry) -> list[tuple[str, str]]:
    """Return what a checkpoint is, in pairs of a word and a text."""
    facts = [("checkpoint", entry.layout)]
    if entry.architecture:
        facts.append(("model", safe(entry.architecture)))
    facts += [("quantised", _quantised_fact(group)) for group in entry.quantised]
    if entry.quantization and not entry.quantised:
        facts.append(("quantised", f"{safe(entry.quantization)}, by the config alone"))
    return [*facts, *_bulk(entry.parameters, entry.dtypes, entry.bytes)]


def _quantised_fact(entry: QuantisedEntry) -> str:
    """`bitsandbytes nf4 · 4 bits · groups of 64 · 28 weights`"""
    parts = [f"{entry.scheme} {entry.format}" if entry.format else safe(entry.scheme)]
    if entry.bits is not None:
        parts.append(f"{entry.bits:g} bits")
    if entry.group is not None:
        parts.append(f"groups of {entry.group:,}")
    parts.append(plural(len(entry.weights), "weight"))
    parts.append(_names(entry.weights))
    if entry.why is not None:
        parts.append(f"not read: {safe(entry.why)}")
    return " · ".join(parts)


def _bulk(parameters: int, dtypes: Mapping[str, int], nbytes: int) -> list[tuple[str, str]]:
    tensors = sum(dtypes.values())
    kinds = " + ".join(dtypes if len(dtypes) < 2 else (f"{dtype} ({count:,})" for dtype, count in dtypes.items()))
    return [
        ("parameters", f"{parameters:,} in {plural(tensors, 'tensor')}"),
        ("size", " · ".join(part for part in (size(nbytes), kinds) if part)),
    ]


# ── rows ──


def _modules(modules: Sequence[InspectedModule], every: bool) -> Iterator[RenderableType]:
    keyed = [(m.name, (m.kind, m.rank, m.alpha, m.scale, m.dtype, m.shape), m) for m in modules]
    groups, left_out = _grouped(keyed, every)
    firsts = [g.items[0] for g in groups]
    with_values = any(m.values is not None for m in modules)
    columns = [
        Column("module", [g.name for g in groups], numeric=False),
        Column("count", [f"{len(g.items):,}" for g in groups]),
        Column("kind", [m.kind for m in firsts], numeric=False),
        Column("rank", [f"{m.rank:,}" if m.rank is not None else "–" for m in firsts]),
        Column("alpha", [number(m.alpha) if m.alpha is not None else "–" for m in firsts], spare=2),
        Column("scale", [number(m.scale) for m in firsts], spare=2 if with_values else 0),
        Column("shape", [shape(m.shape) for m in firsts], spare=3 if with_values else 0),
        Column("dtype", [m.dtype for m in firsts], numeric=False),
        Column("parameters", [f"{sum(m.parameters for m in g.items):,}" for g in groups], spare=1),
    ]
    hidden = {c.head for c in columns if c.head in ("kind", "dtype") and len(set(c.cells)) == 1}
    if every:
        hidden.add("count")
    if with_values:
        # They are what was asked for; the panel and the table without --values have the rest.
        hidden |= {"alpha", "parameters"}
        columns += _value_columns(groups)
    yield Rows([c for c in columns if c.head not in hidden], ruled=True)
    yield from _left_out(left_out, "module")


def _value_columns(groups: Sequence[Group[InspectedModule]]) -> Iterator[Column]:
    read = [[m.values for m in g.items if m.values is not None] for g in groups]
    yield Column("norm", [interval(v.norm for v in values) for values in read])
    yield Column("spectral\nnorm", [interval(v.spectral_norm for v in values) for values in read])
    yield Column("stable\nrank", [interval(v.stable_rank for v in values) for values in read], spare=1)
    yield Column("effective\nrank", [interval(v.effective_rank for v in values) for values in read])


def _tensors(word: str, tensors: Sequence[TensorEntry], every: bool) -> Iterator[RenderableType]:
    groups, left_out = _grouped([(t.name, (t.shape, t.dtype), t) for t in tensors], every)
    firsts = [g.items[0] for g in groups]
    columns = [
        Column(word, [g.name for g in groups], numeric=False),
        Column("count", [f"{len(g.items):,}" for g in groups]),
        Column("shape", [shape(t.shape) for t in firsts]),
        Column("dtype", [t.dtype for t in firsts], numeric=False),
        Column("parameters", [f"{sum(t.parameters for t in g.items):,}" for g in groups]),
    ]
    yield Rows([c for c in columns if c.head != "count" or not every], ruled=True)
    yield from _left_out(left_out, word)


def _grouped(
    items: Sequence[tuple[str, Hashable, _Item]], every: bool
) -> tuple[list[Group[_Item]], list[Group[_Item]]]:
    """The groups that get a row, and those that are left out because there are too many."""
    if every:
        return [Group(safe(name), (item,)) for name, _, item in items], []
    groups = grouped(items)
    return groups[:_MOST_ROWS], groups[_MOST_ROWS:]


def _left_out(groups: Sequence[Group[_Item]], word: str) -> Iterator[RenderableType]:
    """A line that counts what has no row."""
    if groups:
        count = sum(len(group.items) for group in groups)
        rows = f" in {plural(len(groups), 'row')}" if count != len(groups) else ""
        yield Text(f"… and {plural(count, word)} more{rows}, whose names have no pattern; --modules lists every one")


def _overview(entries: Sequence[Entry]) -> list[RenderableType]:
    """The table of `list`: a row for each source."""
    # Here, because one source has no need of it.
    from loratools.ops.listing.rows import ListedAdapter
    from loratools.ops.listing.summary import row_of_adapter
    from loratools.report.listing import table_of

    def row(entry: Entry) -> ListedAdapter:
        match entry:
            case AdapterEntry():
                return row_of_adapter(entry, None)
            case CheckpointEntry():
                return ListedAdapter(
                    entry.path,
                    kind=f"{entry.layout} checkpoint",
                    dtype=max(entry.dtypes, key=lambda dtype: entry.dtypes[dtype], default=None),
                    parameters=entry.parameters,
                    bytes=entry.bytes,
                    warnings=entry.warnings,
                )
            case FailedEntry():
                return ListedAdapter(entry.path, error=entry.error.message)

    return table_of([row(entry) for entry in entries])


# ── remarks ──

_COLOURS = {"error": "bold red", "warning": "bold yellow", "hint": "bold cyan"}


def _remarks(remarks: Iterable[tuple[str, str]], *, spaced: bool = True) -> Iterator[RenderableType]:
    for i, (label, text) in enumerate(remarks):
        if spaced and i == 0:
            yield ""
        yield Text.assemble((f"{label}: ", _COLOURS.get(label, "dim")), safe(text), overflow="fold")


def adapter_remarks(entry: AdapterEntry) -> Iterator[tuple[str, str]]:
    """What a person should know about an adapter, in pairs of a level and a sentence."""
    if entry.not_finite:
        yield "warning", f"values not finite in {_names(entry.not_finite)}"
    if entry.untrained:
        yield "warning", _untrained(entry)
    if entry.mostly_zero:
        yield "warning", _mostly_zero(entry)
    yield from (("warning", w) for w in entry.warnings)


def best_checkpoint_text(run: TrainingRun) -> str:
    """Which checkpoint of a training run was the best, and by what."""
    if run.error is not None:
        return f"not known: {run.error}"
    place = f"{run.path}/{run.best}" if run.best_exists else f"{run.best}, which is not in '{run.path}'"
    facts = [f"{run.metric or 'the metric'} {number(run.metric_value)}"] if run.metric_value is not None else []
    if run.best_step is not None:
        facts.append(f"step {run.best_step:,}" + (f" of {run.steps:,}" if run.steps is not None else ""))
    return " · ".join([place, *facts, f"by {run.state}"])


def not_listed_text(group: NotListed) -> str:
    """Return the paths that have no entry of their own, shortened, and why."""
    paths = ", ".join(group.paths[:_NAMED])
    more = len(group.paths) - _NAMED
    return f"{paths}{f' … and {more:,} more' if more > 0 else ''} ({group.why})"


def _marks(entries: Sequence[Entry]) -> Iterator[tuple[str, str]]:
    """For a list of sources: those that could not be read, with the reason, and those whose values are one to warn."""
    for entry in entries:
        if isinstance(entry, FailedEntry):
            message = entry.error.message
            yield "error", message if entry.path in message else f"{entry.path}: {message}"
            continue
        if entry.not_finite:
            yield "warning", f"{entry.path}: values not finite in {_names(entry.not_finite)}"
        if isinstance(entry, AdapterEntry) and entry.untrained:
            yield "warning", f"{entry.path}: {_untrained(entry)}"
        if isinstance(entry, AdapterEntry) and entry.mostly_zero:
            yield "warning", f"{entry.path}: {_mostly_zero(entry)}"
    warned = [(entry.path, w) for entry in entries if not isinstance(entry, FailedEntry) for w in entry.warnings]
    yield from (("warning", f"{path}: {warning}") for path, warning in warned[:_MOST_WARNINGS])
    if (more := len(warned) - _MOST_WARNINGS) > 0:
        yield "warning", f"{more:,} more; --modules and --json show every one"


def _mostly_zero(entry: AdapterEntry) -> str:
    modules = plural(len(entry.mostly_zero), "module")
    return f"most rows of B are zeros in {modules}, as a lost shard leaves them: {_names(entry.mostly_zero)}"


def _untrained(entry: AdapterEntry) -> str:
    names = "all of them" if len(entry.untrained) == len(entry.modules) else _names(entry.untrained)
    return f"{plural(len(entry.untrained), 'module')} untrained, changing nothing: {names}"


def checkpoint_remarks(entry: CheckpointEntry) -> Iterator[tuple[str, str]]:
    """What a person should know about a checkpoint, in pairs of a level and a sentence."""
    for name, stored in entry.tied.items():
        yield "tied", f"{name} is {stored}"
    if entry.left_out:
        yield "left out", ", ".join(f"{name} ({why})" for name, why in entry.left_out.items())
    if entry.values_read:
        count = sum(t.non_finite or 0 for t in entry.tensors)
        if count:
            yield "warning", f"{plural(count, 'value')} not finite, in {_names(entry.not_finite)}"
        else:
            yield "values", "all finite"
    yield from (("warning", w) for w in entry.warnings)


def _names(names: Sequence[str]) -> str:
    groups = [g.name for g in grouped([(n, None, n) for n in names])]
    more = len(groups) - _NAMED
    return ", ".join(groups[:_NAMED]) + (f" … and {more:,} more" if more > 0 else "")
