"""Give an adapter another rank: each module becomes the nearest one that is small enough, in Frobenius norm.

Exact, from the factors (`algebra.lowrank`): the best approximation of rank k of a product of thin factors costs two
thin QR decompositions and the SVD of a small core.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loratools import formats
from loratools.adapter import Adapter
from loratools.errors import UsageError
from loratools.execution.local import run, single_threaded_torch, worker_count
from loratools.ops._arguments import RankFrom, load_adapter, stored_dtype
from loratools.ops._reduce import (
    Limit,
    Module,
    Stored,
    exact_factors,
    overall_error,
    reduced,
    update_dtype,
)
from loratools.storage.commit import check_output
from loratools.tensors import DTYPE_BITS
from loratools.updates import Update


@dataclass(frozen=True)
class ResizeReport:
    """What a resizing did. `unchanged` counts the modules that were small enough already and keep their bytes.

    `output` is None where nothing was written, `adapter` where it was only planned.
    """

    modules: tuple[Module, ...]
    error: float | None
    unchanged: int | None
    output: Path | None
    adapter: Adapter | None
    bytes: int | None
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        """The document of `loratools resize --json`, without its head."""
        return {
            "modules": [m.as_json() for m in self.modules],
            "error": self.error,
            "unchanged": self.unchanged,
            "bytes": self.bytes,
            "warnings": list(self.warnings),
            "output": str(self.output) if self.output is not None else None,
        }


def resize(
    adapter: str | Path | Adapter,
    out: str | Path | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
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
) -> ResizeReport:
    """Return the adapter with every module at the smallest rank that the rule allows, written to `out` if given.

    rank     at most this rank.
    energy   keep at least this share of each module's squared Frobenius norm.
    error    lose at most this share of each module's Frobenius norm.
    dtype    of the stored factors; otherwise each module keeps its own.
    include, exclude   globs; what they leave out is not in the result.
    plan     work out ranks from headers alone; nothing is read, computed or written.

    A module at or below its rank passes through with its tensors byte for byte, unless a dtype is asked for; the others
    have their singular values split evenly between A and B, and scale 1. Replaced weights pass through.
    Computed in float64; errors are those of the stored values.

    Raises:
        UsageError: not exactly one of rank, energy and error.
        UnsupportedError: the scale of the adapter is uncertain, or an update has no factors.
        InputError: values that are not finite, or that do not fit the dtype.
        OutputExistsError: `out` exists, or is the input.
    """
    limit = Limit(rank, energy, error)
    if not limit.given:
        raise UsageError("no rank to resize to", hint="give one of --rank, --energy and --error")
    cast_to = stored_dtype(dtype) if dtype is not None else None
    source = load_adapter(adapter, rank_from=rank_from, from_format=from_format)
    inputs = [source.path] if source.path is not None else []
    if out is not None:
        check_output(Path(out), overwrite=overwrite, inputs=inputs)
    source = source.selected(include, exclude)
    warnings = list(source.warnings)

    if plan:
        planned = [Module(name, u.rank, limit.planned(u.rank)) for name, u in source.updates.items()]
        nbytes = _planned_bytes(source, limit, cast_to)
        return ResizeReport(tuple(planned), None, None, None, None, nbytes, tuple(warnings))

    def work(item: tuple[str, Update]) -> Stored:
        name, update = item
        factors = exact_factors(update, name, source.name)
        store_as = cast_to or update_dtype(update)
        smaller = reduced(factors, limit, name, store_as, unchanged=update, unchanged_dtype=cast_to)
        if progress is not None:
            progress(sum(t.nbytes for t in update.parts.values()))
        return smaller

    with single_threaded_torch():
        results = run(list(source.updates.items()), work, threads=worker_count(threads))
    updates = {name: r.update for name, r in zip(source.updates, results, strict=True)}
    result = replace(source, updates=updates, path=None, warnings=())
    modules = [r.module(name, u.rank) for (name, u), r in zip(source.updates.items(), results, strict=True)]
    if out is not None:
        warnings += formats.save(result, Path(out), format=format, overwrite=overwrite, inputs=inputs)
    return ResizeReport(
        modules=tuple(modules),
        error=overall_error(modules),
        unchanged=sum(r.update is u for r, u in zip(results, source.updates.values(), strict=True)),
        output=Path(out) if out is not None else None,
        adapter=result,
        bytes=sum(t.nbytes for t in result.tensors().values()),
        warnings=tuple(warnings),
    )


def _planned_bytes(adapter: Adapter, limit: Limit, dtype: str | None) -> int | None:
    """Bytes of the tensors of the result; None where ranks are not known before computing."""
    total = sum(r.tensor.nbytes for r in adapter.replacements.values())
    for update in adapter.updates.values():
        rank = limit.planned(update.rank)
        if rank is None:
            return None
        total += rank * sum(update.shape[:2]) * DTYPE_BITS[dtype or update_dtype(update)] // 8
    return total
