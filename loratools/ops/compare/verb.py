"""compare: how alike the deltas of adapters are, module by module, and how they would interfere.

Everything is computed in float64 from the factors (`algebra.lowrank`). No dense matrix is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, overload

from loratools.adapter import Adapter
from loratools.arguments import Globs, Positive, checked
from loratools.errors import MismatchError
from loratools.execution.local import run, single_threaded_torch, worker_count
from loratools.formats import Base
from loratools.formats.common.leave_out import LeaveOut
from loratools.formats.common.opened_base import known_base
from loratools.ops.common.arguments import AdapterSource, RankFrom, Reading, load_weighted
from loratools.ops.common.fetching import fetch_values
from loratools.ops.common.progress import bytes_of, expect
from loratools.ops.common.same_layers import require_same_layers
from loratools.ops.compare.matrix import compare_all
from loratools.ops.compare.module_pair import ModulePair, Side, module_pair, overall, require_comparable
from loratools.ops.compare.report import CompareReport, ComparisonMatrix
from loratools.ops.lowrank.experts import apart
from loratools.selection import select_names
from loratools.storage.held_inputs import holding_inputs
from loratools.storage.same import same_bytes
from loratools.updates.lora_experts import Packing

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratools.checkpoints import Checkpoint

    class _Options(TypedDict, total=False):
        """The options of `compare`, which mean the same for two adapters and for more."""

        include: Globs
        exclude: Globs
        rank_from: RankFrom
        expert_packing: Packing | None
        from_format: str | None
        base: str | Path | Checkpoint | Base | None
        threads: Positive | None
        progress: Callable[[int], None] | None


@overload
def compare(first: AdapterSource, second: AdapterSource, **options: Unpack[_Options]) -> CompareReport: ...
@overload
def compare(
    first: AdapterSource,
    second: AdapterSource,
    third: AdapterSource,
    /,
    *others: AdapterSource,
    **options: Unpack[_Options],
) -> ComparisonMatrix: ...
@checked(Checkpoint="loratools.checkpoints")
@holding_inputs()
def compare(
    first: AdapterSource,
    second: AdapterSource,
    *others: AdapterSource,
    include: Globs = (),
    exclude: Globs = (),
    rank_from: RankFrom = None,
    expert_packing: Packing | None = None,
    from_format: str | None = None,
    base: str | Path | Checkpoint | Base | None = None,
    threads: Positive | None = None,
    progress: Callable[[int], None] | None = None,
) -> CompareReport | ComparisonMatrix:
    """Compare two adapters over the modules that both have, or every pair of several adapters.

    Args:
        first: The first adapter: a path or a loaded adapter.
        second: The second adapter.
        others: More adapters. With them, every pair is compared and the report is a `ComparisonMatrix`.
        include: Globs over the module names of both adapters; empty selects all.
        exclude: Globs of names to leave out.
        rank_from: `tensors` or `config`: which rank the scale is computed from, if the two disagree.
        expert_packing: `peft` or `expert-major`: how the columns of B are ordered for fused experts, if the files do
            not say.
        from_format: The format of the adapters; detected from the content if None.
        base: The base model, needed if module names alone are ambiguous: a path, an opened checkpoint, or a `Base`.
        threads: Number of workers; one per CPU if None. The result does not depend on it.
        progress: Called with the number of bytes read since the last call.

    Returns:
        For two adapters, a `CompareReport` with cosines, overlaps of subspaces, ratios of norms and principal angles
        (degrees), per module and overall. For more, a `ComparisonMatrix` of cosines and overlaps, with an order that
        puts similar adapters next to each other.

    Raises:
        MismatchError: No module is in both adapters, or a module has a different shape in each.
        UnsupportedError: The scale of an adapter is uncertain, or an update is not low rank.
        InputError: Values are NaN or infinite.

    Example:
        >>> import loratools
        >>> report = loratools.compare("fixtures/llama-tiny-science", "fixtures/llama-tiny-science")
        >>> round(report.cosine, 6)
        1.0
    """
    known = known_base(base)
    leave_out = LeaveOut.of(include, exclude)
    loaded = load_weighted(
        [first, second, *others],
        Reading(
            rank_from=rank_from,
            expert_packing=expert_packing,
            from_format=from_format,
            base=known,
            leave_out=leave_out,
        ),
    )
    require_same_layers([a for a, _ in loaded], hint="merge each into its base, and compare the merged models")
    chosen = _chosen([replace(a, updates=apart(a.updates)[0]) for a, _ in loaded], include, exclude)
    warnings = [f"'{a.name}': {text}" for a in chosen for text in a.warnings]
    fetch_values(*chosen)
    if others:
        return compare_all(chosen, threads=threads, progress=progress, warnings=warnings)
    return _compare_two(chosen[0], chosen[1], threads, progress, warnings)


def _chosen(adapters: Sequence[Adapter], include: Globs, exclude: Globs) -> list[Adapter]:
    """The adapters, with the modules and replaced weights that the globs select."""
    every = sorted({name for a in adapters for name in (*a.updates, *a.replacements)})
    unread = tuple(name for a in adapters for name in a.unread_tensors)
    names = set(select_names(every, include, exclude, unread=unread))
    return [
        replace(
            a,
            updates={name: update for name, update in a.updates.items() if name in names},
            replacements={name: weight for name, weight in a.replacements.items() if name in names},
        )
        for a in adapters
    ]


def _compare_two(
    first: Adapter,
    second: Adapter,
    threads: int | None,
    progress: Callable[[int], None] | None,
    warnings: Sequence[str],
) -> CompareReport:
    first_updates, second_updates = first.updates, second.updates
    shared = [name for name in first_updates if name in second_updates]
    if not shared:
        examples = [next(iter(a.updates), "nothing") for a in (first, second)]
        raise MismatchError(
            f"'{first.name}' and '{second.name}' have no module in common",
            details=[f"'{a.name}': {name}, ..." for a, name in zip((first, second), examples, strict=True)],
            hint="they are for different models, or name modules in different ways",
        )
    require_comparable((first, second), shared)

    def work(name: str) -> ModulePair:
        pair = module_pair(name, Side.of(name, first), Side.of(name, second))
        if progress is not None:
            progress(bytes_of((first_updates[name], second_updates[name])))
        return pair

    expect(progress, bytes_of(updates[name] for name in shared for updates in (first_updates, second_updates)))
    with single_threaded_torch():
        pairs = run(shared, work, threads=worker_count(threads))
    unshared = [
        sorted((a.updates.keys() - b.updates.keys()) | (a.replacements.keys() - b.replacements.keys()))
        for a, b in ((first, second), (second, first))
    ]
    heads = [name for name in first.replacements if name in second.replacements]
    equal = {name for name in heads if same_bytes(first.replacements[name].tensor, second.replacements[name].tensor)}
    return CompareReport(
        paths=(first.name, second.name),
        modules=tuple(p.module() for p in pairs),
        only_in_first=tuple(unshared[0]),
        only_in_second=tuple(unshared[1]),
        replacements_equal=tuple(sorted(equal)),
        replacements_differ=tuple(sorted(set(heads) - equal)),
        warnings=tuple(warnings),
        **overall(pairs),
    )
