"""Give an adapter another rank: each module becomes the nearest one that is small enough, in Frobenius norm.

Exact, from the factors (`algebra.lowrank`): the best approximation of rank k of a product of thin factors costs two
thin QR decompositions and the SVD of a small core. A budget for the whole adapter is shared out over its modules by
their singular values (`algebra.allocation`), so that what is lost in all is least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratools import formats
from loratools.adapter import Adapter
from loratools.arguments import Globs, Positive, Size, byte_size, checked
from loratools.errors import UsageError
from loratools.execution.local import run, single_threaded_torch, worker_count
from loratools.formats import Base
from loratools.formats.common.notes import lora_notes
from loratools.formats.common.opened_base import known_base
from loratools.ops.common.arguments import RankFrom, load_adapter, stored_dtype
from loratools.ops.common.output import output_format
from loratools.ops.lowrank.experts import apart, together
from loratools.ops.lowrank.factors import (
    exact_factors,
    is_vector,
    layout_of,
    reason_against,
    refuse_together,
)
from loratools.ops.lowrank.limit import Limit
from loratools.ops.lowrank.reduce import ReducedModule, Stored, overall_error, passed_through, reduced, update_dtype
from loratools.short_repr import few_lines
from loratools.storage.commit import check_output
from loratools.storage.held_inputs import holding_inputs
from loratools.tensors.dtypes import DTYPE_BITS
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.checkpoints import Checkpoint

# What a tensor adds to the header of a file besides its name: prefix and suffix, dtype, shape, offsets. At most.
_HEADER_BYTES = 160


@dataclass(frozen=True)
class ResizeReport:
    """What a resizing did, or of a plan what it would do: all is computed, and nothing written.

    `unchanged` counts the modules that were small enough already and keep their bytes. `output` is None where nothing
    was written, `adapter` of a plan.
    """

    modules: tuple[ReducedModule, ...]
    error: float
    unchanged: int
    output: Path | None
    adapter: Adapter | None
    bytes: int
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return few_lines(self)

    def rows(self) -> list[dict[str, object]]:
        """Return one row per module, for a data frame: `pandas.DataFrame(report.rows())`."""
        return [module.to_dict() for module in self.modules]

    def to_dict(self) -> dict[str, object]:
        """The document of `loratools resize --json`, without its head."""
        return {
            "modules": [m.to_dict() for m in self.modules],
            "error": self.error,
            "unchanged": self.unchanged,
            "bytes": self.bytes,
            "warnings": list(self.warnings),
            "output": str(self.output) if self.output is not None else None,
        }


@checked(Checkpoint="loratools.checkpoints")
@holding_inputs()
def resize(
    adapter: str | Path | Adapter,
    out: str | Path | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    rule: tuple[str, float] | None = None,
    max_size: Size | None = None,
    max_params: int | None = None,
    max_rank: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    include: Globs = (),
    exclude: Globs = (),
    rank_from: RankFrom = None,
    from_format: str | None = None,
    format: str | None = None,
    base: str | Path | Checkpoint | Base | None = None,
    threads: Positive | None = None,
    progress: Callable[[int], None] | None = None,
    plan: bool = False,
) -> ResizeReport:
    """Return the adapter with another rank: each module becomes the nearest one, in Frobenius norm.

    One of `rank`, `energy`, `error`, `rule`, `max_size` and `max_params` chooses the ranks. A LoRA at or below its rank
    passes through with its tensors byte for byte, unless a dtype is asked for. The others have their singular values
    split evenly between A and B, and scale 1; other kinds become LoRA. Replaced weights, and changes of vectors, pass
    through. Computed in float64; errors are those of the stored values.

    Args:
        adapter: The adapter, by its path or loaded.
        out: Where to write the result; nothing is written where it is None.
        rank: At most this rank in every module.
        energy: Keep at least this share of each module's squared Frobenius norm, in (0, 1].
        error: Lose at most this share of each module's Frobenius norm, in (0, 1).
        rule: A rule of kohya's resize script and its number: `("sv_ratio", 20)`, `("sv_cumulative", 0.9)` or
            `("sv_fro", 0.9)`.
        max_size: Bytes that the file of weights may have, as a number or as "5MB". Ranks are shared out over the
            modules so that the loss over all is least.
        max_params: The same for the number of parameters.
        max_rank: No rank is above this, whatever the rule.
        dtype: The dtype of the stored factors; each module keeps its own where it is None.
        overwrite: Replace an output that loratools wrote. Files of other origin are never replaced.
        include: Globs over the names of modules; all are taken where there is none.
        exclude: Globs of what is left out.
        rank_from: `tensors` or `config`: which rank makes the scale, where the two disagree.
        from_format: The format of the adapters, where it is not to be found from the content.
        format: The format to write, one of `list_formats()`; where it is None, that of the adapter where it can be
            written, otherwise peft.
        base: The model that it is for, where names alone do not tell: its path, opened, or its names and config.
        threads: Workers; one per CPU where it is None. The result does not depend on it.
        progress: Called with the number of bytes just read.
        plan: Compute everything, and write nothing.

    Returns:
        A report of ranks and errors; `report.adapter` is the result, and None of a plan.

    Raises:
        UsageError: Not exactly one rule, or a budget in which rank 1 everywhere has no place.
        UnsupportedError: The scale of the adapter is uncertain, or an update has no factors.
        InputError: Values that are not finite, or that do not fit the dtype.
        OutputExistsError: `out` exists, or is the input.

    Example:
        >>> import loratools
        >>> report = loratools.resize("fixtures/llama-tiny-science", "science-4", rank=4)
        >>> report.adapter["model.layers.0.self_attn.q_proj"].rank
        4
    """
    if max_size is not None:
        max_size = byte_size(max_size)
    limit = Limit(rank, energy, error, rule, max_rank)
    budgets = {"--max-size": max_size, "--max-params": max_params}
    given = [name for name, value in budgets.items() if value is not None]
    rules = [f"--{n}" for n in ("rank", "energy", "error", "rule") if getattr(limit, n) is not None]
    if len(given + rules) > 1:
        raise UsageError(f"{' and '.join(rules + given)} exclude each other", hint="give one of them")
    if not limit.given and not given:
        raise UsageError(
            "no rank to resize to", hint="give one of --rank, --energy, --error, --rule, --max-size and --max-params"
        )
    cast_to = stored_dtype(dtype) if dtype is not None else None
    known = known_base(base)
    source = load_adapter(adapter, rank_from=rank_from, from_format=from_format, base=known)
    inputs = [source.path] if source.path is not None else []
    chosen = output_format([source], out, format)
    format = chosen.name
    if out is not None and format == source.format and formats.keeps_names(format) and known is None:
        # Nothing is renamed, and what the file keeps fused gets its rank as a whole.
        source = load_adapter(adapter, rank_from=rank_from, from_format=from_format, stored_names=True)
    if out is not None:
        check_output(formats.named(Path(out), format), overwrite=overwrite, inputs=inputs)
    source = source.selected(include, exclude)
    warnings = [*chosen.warnings, *source.warnings]
    whole, (parts, layers) = source, apart(source.updates)
    source = replace(source, updates=parts)
    why_not = {name: reason_against(u) for name, u in source.updates.items()}
    refuse_together([f"{name}   {why}" for name, why in why_not.items() if why is not None], len(why_not))
    workers = worker_count(threads)
    limits: Mapping[str, Limit] = dict.fromkeys(source.updates, limit)
    if max_size is not None:
        limits = _shared_out(source, byte_size(max_size), cast_to, max_rank, workers, size=True)
    elif max_params is not None:
        limits = _shared_out(source, max_params, cast_to, max_rank, workers, size=False)

    def work(item: tuple[str, Update]) -> tuple[Stored, ReducedModule]:
        name, update = item
        factors = exact_factors(update, name, source.name)
        if is_vector(update):
            stored = passed_through(update, factors, name, cast_to).stored
            line = stored.module(name, None, None)
        else:
            found = reduced(
                factors,
                limits[name],
                name,
                cast_to or update_dtype(update),
                unchanged=update.as_lora(),
                unchanged_dtype=cast_to,
                layout=layout_of(update),
            )
            stored = found.stored
            line = stored.module(name, factors.rank, found.factors.rank)
        if progress is not None:
            progress(sum(t.nbytes for t in update.parts.values()))
        return stored, line

    with single_threaded_torch():
        results = run(list(source.updates.items()), work, threads=workers)
    updates = together({name: stored.update for name, (stored, _) in zip(source.updates, results, strict=True)}, layers)
    notes = lora_notes(source.notes, updates)
    result = replace(whole, updates=updates, path=None, warnings=(), notes=notes)
    modules = [line for _, line in results]
    if plan:
        formats.ensure_writable(result, format, base=known)
    elif out is not None:
        warnings += formats.save(result, Path(out), format=format, overwrite=overwrite, inputs=inputs, base=known)
    return ResizeReport(
        modules=tuple(modules),
        error=overall_error(modules),
        unchanged=sum(r.update is u for (r, _), u in zip(results, source.updates.values(), strict=True)),
        output=Path(out) if out is not None and not plan else None,
        adapter=None if plan else result,
        bytes=sum(t.nbytes for t in result.tensors().values()),
        warnings=tuple(warnings),
    )


def _shared_out(
    source: Adapter, budget: int, dtype: str | None, max_rank: int | None, workers: int, *, size: bool
) -> dict[str, Limit]:
    """Each module's part of a budget, counted in bytes (`size`) or in parameters."""
    from loratools.algebra.allocation import allocate, least_budget
    from loratools.algebra.lowrank import singular_values

    def spectrum(item: tuple[str, Update]) -> tuple[Tensor, int]:
        factors = exact_factors(item[1], item[0], source.name)
        each = DTYPE_BITS[dtype or update_dtype(item[1])] // 8 if size else 1
        return singular_values(factors), (factors.out_features + factors.in_features) * each

    matrices = [(name, u) for name, u in source.updates.items() if not is_vector(u)]
    vectors = [u for u in source.updates.values() if is_vector(u)]
    with single_threaded_torch():
        found = run(matrices, spectrum, threads=workers)
    fixed = [t.nbytes if size else t.elements for u in vectors for t in u.parts.values()]
    spectra, costs = [s for s, _ in found], [cost for _, cost in found]
    # A module of zeros is stored with rank 1 all the same.
    left = _room(source, budget) if size else budget
    room = left - sum(fixed) - sum(cost for s, cost in found if not s.any())
    least = least_budget(spectra, costs)
    if room < least:
        unit = "bytes" if size else "parameters"
        raise UsageError(
            f"{budget:,} {unit} are too few: rank 1 in each of {len(costs)} modules takes {least:,}, and names, texts, "
            f"vectors and weights that are stored whole {budget - room:,}",
            hint="allow more, or leave modules out with --exclude",
        )
    ranks = allocate(spectra, costs, room, maximum=max_rank)
    return {name: Limit(rank=max(1, rank)) for (name, _), rank in zip(matrices, ranks, strict=True)}


def _room(source: Adapter, max_size: int) -> int:
    """Bytes that are left for factors in a file of that size, at least."""
    names = [*(f"{name}.{part}" for name in source.updates for part in "AB"), *source.replacements]
    header = sum(len(name.encode()) + _HEADER_BYTES for name in names)
    said = sum(len(str(note)) for note in source.notes.values())
    return max_size - header - said - sum(r.tensor.nbytes for r in source.replacements.values())
