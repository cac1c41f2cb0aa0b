"""Combine weighted adapters into one, target by target, in core coordinates.

    dW = method([(w_1, dW_1), (w_2, dW_2), ...])        `linear`: the exact weighted sum

A method (`methods/`) sees the factors of one target. Everything else is here: targets that only some adapters have,
truncation, storing, what each adapter still says in the result, and what of the source's notes stays true.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from loratools import formats, registry
from loratools.adapter import Adapter, Replacement, select_names
from loratools.errors import MismatchError
from loratools.execution.local import run, single_threaded_torch, worker_count
from loratools.methods import Method
from loratools.ops._arguments import AdapterArgument, AdapterSource, RankFrom, load_weighted, stored_dtype
from loratools.ops._reduce import (
    Limit,
    Module,
    Stored,
    exact_factors,
    inner,
    overall_error,
    reduced,
    update_dtype,
    widest,
)
from loratools.ops._same import same_bytes
from loratools.storage.commit import check_output
from loratools.tensors import DTYPE_BITS
from loratools.updates import Update

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors


@dataclass(frozen=True)
class Share:
    """What an adapter says in the result, over all its targets; own is its delta at weight 1.

    gain: `<result, own> / |own|^2`: 1 where the adapter is all there, the weight where nothing else overlaps.
    interference: `|(result - own) on the row space of own| / |own|`: 0 where inputs that the adapter reacts to are
        answered as by the adapter alone.
    None of a plan, of an adapter that is zero, and of one with weight 0.
    """

    path: str
    weight: float
    gain: float | None = None
    interference: float | None = None


@dataclass(frozen=True)
class CombineReport:
    """What a combination did. `output` is None where nothing was written, `adapter` where it was only planned."""

    modules: tuple[Module, ...]
    adapters: tuple[Share, ...]
    error: float | None
    output: Path | None
    adapter: Adapter | None
    bytes: int | None
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        """The document of `loratools combine --json`, without its head."""
        return {
            "modules": [m.as_json() for m in self.modules],
            "adapters": [
                {"path": a.path, "weight": a.weight, "gain": a.gain, "interference": a.interference}
                for a in self.adapters
            ],
            "error": self.error,
            "bytes": self.bytes,
            "warnings": list(self.warnings),
            "output": str(self.output) if self.output is not None else None,
        }


def combine(
    adapters: Sequence[AdapterArgument] | AdapterSource,
    out: str | Path | None = None,
    *,
    method: str = "linear",
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rank_from: RankFrom = None,
    from_format: str | None = None,
    format: str = "peft",
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    plan: bool = False,
) -> CombineReport:
    """Return the combination of `adapters`, written to `out` where that is given.

    adapters         paths, loaded adapters, or pairs of one of these and a weight (1 where none is given). The weight
                     multiplies the delta; 0 means that the adapter takes no part.
    rank, energy     truncate each module to this rank, or to this share of its energy; otherwise ranks add up.
    dtype            of the stored factors; otherwise each module keeps the widest of its sources.
    include, exclude globs over the names of all adapters together.
    plan             work out ranks from headers alone; nothing is read, computed or written.

    Computed in float64 and stored at scale 1. A module that only one adapter has, with weight 1, keeps its tensors
    byte for byte, unless it is truncated or cast. Errors are those of the stored values.

    Raises:
        MismatchError: adapters that give a target different shapes, or replace a weight with different values.
        UnsupportedError: the scale of an adapter is uncertain, or an update has no factors.
        InputError: values that are not finite, or that do not fit the dtype.
        OutputExistsError: `out` exists, or is one of the inputs.
    """
    limit = Limit(rank=rank, energy=energy)
    store_as = stored_dtype(dtype) if dtype is not None else None
    chosen = cast(Method, registry.load("methods", method))
    sources = load_weighted(adapters, rank_from=rank_from, from_format=from_format)
    taking_part = [i for i, (_, weight) in enumerate(sources) if weight]
    inputs = [a.path for a, _ in sources if a.path is not None]
    if out is not None:
        check_output(Path(out), overwrite=overwrite, inputs=inputs)

    selected = _selected(sources, include, exclude)
    targets = _targets(sources, selected, taking_part)
    replacements, warnings = _replacements(sources, selected, taking_part)
    warnings = [*_base_warnings(sources, taking_part), *warnings]
    warnings += [f"'{a.name}': {text}" for a, _ in sources for text in a.warnings]

    if plan:
        modules = [_planned(name, terms, limit) for name, terms in targets.items()]
        shares = [Share(a.name, w) for a, w in sources]
        nbytes = _planned_bytes(modules, targets, replacements, store_as)
        return CombineReport(tuple(modules), tuple(shares), None, None, None, nbytes, tuple(warnings))

    def work(item: tuple[str, Sequence[_Term]]) -> _Combined:
        combined = _combined(*item, chosen, limit, store_as)
        if progress is not None:
            progress(sum(t.nbytes for term in item[1] for t in term.update.parts.values()))
        return combined

    with single_threaded_torch():
        results = run(list(targets.items()), work, threads=worker_count(threads))
    updates = {name: r.stored.update for name, r in zip(targets, results, strict=True)}
    result = _adapter([sources[i][0] for i in taking_part], updates, replacements)
    nbytes = sum(t.nbytes for t in result.tensors().values())
    modules = [r.stored.module(name, r.rank_in) for name, r in zip(targets, results, strict=True)]
    shares = [_share(i, a, w, results) for i, (a, w) in enumerate(sources)]
    if out is not None:
        warnings += formats.save(result, Path(out), format=format, overwrite=overwrite, inputs=inputs)
    return CombineReport(
        modules=tuple(modules),
        adapters=tuple(shares),
        error=overall_error(modules),
        output=Path(out) if out is not None else None,
        adapter=result,
        bytes=nbytes,
        warnings=tuple(warnings),
    )


@dataclass(frozen=True)
class _Term:
    """What one adapter, the one at `index`, says of a target."""

    index: int
    weight: float
    update: Update
    whose: str


@dataclass(frozen=True)
class _Overlap:
    """An adapter's part in one target: `<result, own>`, `|own|^2`, and `|result - own|^2` on the row space of own."""

    index: int
    inner: float
    own: float
    interference: float


@dataclass(frozen=True, eq=False)
class _Combined:
    stored: Stored
    rank_in: int
    overlaps: tuple[_Overlap, ...]


def _selected(sources: Sequence[tuple[Adapter, float]], include: Sequence[str], exclude: Sequence[str]) -> set[str]:
    """Names that --include and --exclude leave, of all adapters together: a glob need not match in each of them."""
    every = sorted({name for a, _ in sources for name in (*a.updates, *a.replacements)})
    return set(select_names(every, include, exclude) if include or exclude else every)


def _targets(
    sources: Sequence[tuple[Adapter, float]], selected: set[str], taking_part: Sequence[int]
) -> dict[str, list[_Term]]:
    """The union of targets, sorted, each with the terms of the adapters that have it."""
    targets: dict[str, list[_Term]] = {}
    for i in taking_part:
        adapter, weight = sources[i]
        for name, update in adapter.updates.items():
            if name in selected:
                targets.setdefault(name, []).append(_Term(i, weight, update, adapter.name))
    misfits = [
        f"{name}   " + ", ".join(f"'{t.whose}' {_flow(t.update.shape)}" for t in terms)
        for name, terms in sorted(targets.items())
        if len({t.update.shape for t in terms}) > 1
    ]
    if misfits:
        raise MismatchError(
            f"the adapters differ in the shape of {len(misfits)} of {len(targets)} modules",
            details=misfits,
            hint="they were trained on different models; leave such modules out with --exclude",
        )
    return dict(sorted(targets.items()))


def _flow(shape: Sequence[int]) -> str:
    return f"{shape[1]} -> {shape[0]}" if len(shape) == 2 else "x".join(map(str, shape))


def _replacements(
    sources: Sequence[tuple[Adapter, float]], selected: set[str], taking_part: Sequence[int]
) -> tuple[dict[str, Replacement], list[str]]:
    """Replaced weights of the result, and what a person should know about them. Deltas add, whole weights do not."""
    owners: dict[str, list[int]] = {}
    for i in taking_part:
        for name in sources[i][0].replacements:
            if name in selected:
                owners.setdefault(name, []).append(i)
    kept = {name: sources[found[0]][0].replacements[name] for name, found in sorted(owners.items())}
    differing = [
        f"{name}   " + ", ".join(f"'{sources[i][0].name}'" for i in owners[name])
        for name in kept
        if not all(same_bytes(kept[name].tensor, sources[i][0].replacements[name].tensor) for i in owners[name][1:])
    ]
    if differing:
        raise MismatchError(
            f"{len(differing)} weights are replaced with different values, and a sum of those means nothing",
            details=differing,
            hint=f"leave them out with --exclude '{differing[0].partition('   ')[0]}', or combine without one adapter",
        )
    warnings = []
    lonely = [name for name in kept if len(owners[name]) < len(taking_part)]
    if lonely:
        more = f" and {len(lonely) - 1} more" if len(lonely) > 1 else ""
        warnings.append(f"replaced weights that not all adapters have are kept: {lonely[0]}{more}")
    if kept and any(sources[i][1] != 1 for name in kept for i in owners[name]):
        warnings.append(f"weights do not apply to replaced weights: {len(kept)} are kept as they are")
    return kept, warnings


def _base_warnings(sources: Sequence[tuple[Adapter, float]], taking_part: Sequence[int]) -> list[str]:
    bases = {sources[i][0].base_model for i in taking_part} - {None}
    if len(bases) < 2:
        return []
    return [f"the adapters name different base models: {', '.join(sorted(map(repr, bases)))}"]


def _planned(name: str, terms: Sequence[_Term], limit: Limit) -> Module:
    rank_in = sum(t.update.rank for t in terms)
    return Module(name, rank_in, limit.planned(rank_in))


def _planned_bytes(
    modules: Sequence[Module],
    targets: Mapping[str, Sequence[_Term]],
    replacements: Mapping[str, Replacement],
    dtype: str | None,
) -> int | None:
    """Bytes of the tensors of the result; None where ranks are not known before computing."""
    total = sum(r.tensor.nbytes for r in replacements.values())
    for module in modules:
        if module.rank is None:
            return None
        terms = targets[module.name]
        each = DTYPE_BITS[dtype or widest([update_dtype(t.update) for t in terms])] // 8
        total += module.rank * sum(terms[0].update.shape[:2]) * each
    return total


def _combined(name: str, terms: Sequence[_Term], method: Method, limit: Limit, dtype: str | None) -> _Combined:
    factors = [(t.weight, exact_factors(t.update, name, t.whose)) for t in terms]
    wanted = method.combine(factors)
    source = next((t.update for t, (_, f) in zip(terms, factors, strict=True) if f is wanted), None)
    stored = reduced(
        wanted,
        limit,
        name,
        dtype or widest([update_dtype(t.update) for t in terms]),
        unchanged=source,
        unchanged_dtype=dtype,
    )
    overlaps = [_overlap(t.index, stored.factors, f) for t, (_, f) in zip(terms, factors, strict=True)]
    return _Combined(stored, sum(t.update.rank for t in terms), tuple(overlaps))


def _overlap(index: int, result: Factors, own: Factors) -> _Overlap:
    from loratools.algebra.lowrank import row_space

    rows, square = row_space(own)
    difference = result.b @ (result.a @ rows) - own.b @ (own.a @ rows)
    return _Overlap(index, inner(result, own), square, float(difference.square().sum()))


def _share(index: int, adapter: Adapter, weight: float, results: Sequence[_Combined]) -> Share:
    overlaps = [o for r in results for o in r.overlaps if o.index == index]
    own = math.fsum(o.own for o in overlaps)
    if not own:
        return Share(adapter.name, weight)
    gain = math.fsum(o.inner for o in overlaps) / own
    return Share(adapter.name, weight, gain, math.sqrt(math.fsum(o.interference for o in overlaps) / own))


def _adapter(
    sources: Sequence[Adapter], updates: Mapping[str, Update], replacements: Mapping[str, Replacement]
) -> Adapter:
    """The result as an adapter, with those notes of the sources that still hold."""
    return replace(
        sources[0],
        updates=updates,
        replacements=replacements,
        path=None,
        base_model=next((a.base_model for a in sources if a.base_model is not None), None),
        notes=_agreed([a.notes for a in sources]),
        warnings=(),
    )


def _agreed(notes: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """What all the sources say alike, at any depth; what they disagree on is true of none of them any more."""
    first, *others = notes
    found: dict[str, object] = {}
    for key, value in first.items():
        said = [other.get(key) for other in others]
        if isinstance(value, Mapping) and all(isinstance(s, Mapping) for s in said):
            found[key] = _agreed([value, *(cast("Mapping[str, object]", s) for s in said)])
        elif all(s == value for s in said):
            found[key] = value
    return found
