"""spectrum: the singular values of an adapter or of a fine-tuned model's change, and what each rank keeps.

For an adapter, all singular values are computed from its factors. For two checkpoints, the largest ones are computed by
certified decompositions of the deltas. The energy of the others is known from the norms, so energies and errors are not
estimates: an extraction at that rank would report the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loratools.adapter import Adapter
from loratools.arguments import Globs, Positive, checked
from loratools.checkpoints import Checkpoint, open_checkpoint
from loratools.errors import InputError, UsageError
from loratools.execution.local import run, single_threaded_torch, worker_count
from loratools.formats.common.leave_out import LeaveOut
from loratools.ops.common.arguments import RankFrom, Reading, load_adapter
from loratools.ops.common.device import device_named, ensure_device
from loratools.ops.common.fetching import fetch_values
from loratools.ops.finetune.delta import Deltas, decomposed
from loratools.ops.finetune.line_up import line_up
from loratools.ops.finetune.pairs import Pair, Pairs
from loratools.ops.lowrank.experts import apart
from loratools.ops.lowrank.factors import require_factors
from loratools.ops.spectrum.modules import spectrum_of_pair, spectrum_of_update
from loratools.ops.spectrum.report import ModuleSpectrum, SpectrumReport
from loratools.ops.spectrum.table import knee_of, rank_table
from loratools.skipped import Skipped
from loratools.storage.casting import stored_dtype
from loratools.storage.held_inputs import holding_inputs
from loratools.storage.same import same_bytes
from loratools.updates.lora_experts import Packing
from loratools.updates.parts.protocol import Update

_DEFAULT_MAX_RANK = 128


@checked
@holding_inputs()
def spectrum(
    source: str | Path | Adapter | Checkpoint,
    base: str | Path | Checkpoint | None = None,
    *,
    max_rank: int = _DEFAULT_MAX_RANK,
    dtype: str = "F32",
    tolerance: float | None = None,
    exact: bool = False,
    seed: int = 0,
    threads: Positive | None = None,
    device: str = "auto",
    include: Globs = (),
    exclude: Globs = (),
    rank_from: RankFrom = None,
    expert_packing: Packing | None = None,
    from_format: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> SpectrumReport:
    """Return the singular values of an adapter, or of the change from `base` to the fine-tuned model `source`.

    Args:
        source: An adapter (a path or a loaded adapter); with `base`, a fine-tuned model.
        base: The model that `source` was fine-tuned from; None for an adapter.
        max_rank: The largest rank to examine; for an adapter, the largest rank in the table.
        dtype: The dtype for which file sizes are computed: float32, bfloat16, float16 or float64.
        tolerance: The share of the captured energy that the approximate decomposition may miss, between 0 and 1.
            Smaller values need more passes over each delta.
        exact: Compute all singular values of the change between two models by exact methods, which are slower.
        seed: Random seed of the decomposition. Equal input and seed give an equal result.
        threads: Number of workers; one per CPU if None. The result does not depend on it.
        device: The device that computes: cpu, cuda, cuda:N, mps, or auto.
        include: Globs over module names; empty selects all.
        exclude: Globs of names to leave out.
        rank_from: `tensors` or `config`: which rank the scale is computed from, if the two disagree.
        expert_packing: `peft` or `expert-major`: how the columns of B are ordered for fused experts, if the files do
            not say.
        from_format: The format of the adapter; detected from the content if None.
        progress: Called with the number of bytes read since the last call.

    Returns:
        A report with the singular values of each module, and for each rank what it keeps (share of the squared
        Frobenius norm), loses (relative Frobenius error) and costs (bytes).

    Raises:
        UsageError: A model is given without its base, or an adapter with one.
        InputError: Nothing changed, or values are NaN or infinite.
        MismatchError: Names or shapes of the two models do not match.
        UnsupportedError: A model is quantised in a way that loratools cannot read, or the scale of the adapter is
            uncertain.

    Example:
        >>> import loratools
        >>> report = loratools.spectrum("fixtures/llama-tiny-science")
        >>> [row.rank for row in report.table][-1]
        16
    """
    if max_rank < 1:
        raise UsageError(f"rank {max_rank} is not positive")
    ensure_device(device)
    stored = stored_dtype(dtype)
    workers = worker_count(threads)
    if base is None:
        if isinstance(source, Checkpoint):
            raise UsageError(f"'{source.name}' is a model", hint="give the model that it was trained from, as base")
        adapter = load_adapter(
            source,
            Reading(
                rank_from=rank_from,
                expert_packing=expert_packing,
                from_format=from_format,
                leave_out=LeaveOut.of(include, exclude),
            ),
        ).selected(include, exclude)
        fetch_values(adapter)
        modules = _spectra_of_adapter(adapter, workers, progress)
        return _reported(adapter.name, None, modules, stored, max_rank, warnings=adapter.warnings)
    if isinstance(source, Adapter):
        raise UsageError("the spectrum of an adapter needs no base", hint="leave out the base")
    before, after = (c if isinstance(c, Checkpoint) else open_checkpoint(Path(c)) for c in (base, source))
    pairs = line_up(before, after, include=include, exclude=exclude)
    layers = [pair for pair in pairs.pairs if pair.layer is not None]
    fetch_values(before, after)
    search = _Search(max_rank, tolerance, exact, seed, device_named(device))
    modules = _spectra_of_pairs(layers, search, workers, progress)
    if not modules:
        raise InputError(
            f"no weight of a layer of '{after.name}' differs from '{before.name}'",
            hint="give the fine-tuned model first, and what it was trained from as --base",
        )
    return _reported(
        after.name,
        before.name,
        modules,
        stored,
        max_rank,
        unchanged=len(layers) - len(modules),
        skipped=_skipped(pairs),
        warnings=pairs.warnings,
    )


@dataclass(frozen=True)
class _Search:
    """The settings of the decompositions; see `spectrum`."""

    max_rank: int
    tolerance: float | None
    exact: bool
    seed: int
    device: str


def _spectra_of_adapter(adapter: Adapter, workers: int, progress: Callable[[int], None] | None) -> list[ModuleSpectrum]:
    # Each expert of a fused parameter is a matrix with a spectrum of its own.
    updates, _ = apart(adapter.updates)
    require_factors(updates.items())
    if not updates:
        raise InputError(f"'{adapter.name}' has no updates, only replaced weights: there is no spectrum")

    def spectrum_of(item: tuple[str, Update]) -> ModuleSpectrum:
        name, update = item
        module = spectrum_of_update(name, update, adapter.name)
        if progress is not None:
            progress(sum(t.nbytes for t in update.parts.values()))
        return module

    with single_threaded_torch():
        return run(list(updates.items()), spectrum_of, threads=workers)


def _spectra_of_pairs(
    layers: Sequence[Pair], search: _Search, workers: int, progress: Callable[[int], None] | None
) -> list[ModuleSpectrum]:
    """The spectra of the changed layers, by name."""

    def spectrum_of(pair: Pair) -> ModuleSpectrum | None:
        module = None if same_bytes(pair.base, pair.tuned) else _decomposed_pair(pair, search)
        if progress is not None:
            progress(pair.nbytes)
        return module

    # The largest first: if it started last, it would keep a single thread busy at the end.
    largest_first = sorted(layers, key=lambda pair: (-pair.nbytes, pair.name))
    with single_threaded_torch():
        modules = run(largest_first, spectrum_of, threads=workers)
    return sorted((module for module in modules if module is not None), key=lambda module: module.name)


def _decomposed_pair(pair: Pair, search: _Search) -> ModuleSpectrum | None:
    """The spectrum of a pair whose bytes differ; None if their values do not differ."""
    from loratools.algebra.rank_rules import Fixed

    decomposition = decomposed(
        Deltas(pair.name, pair.base, pair.tuned, pair.matrices),
        Fixed(min(search.max_rank, *pair.matrices[1:])),
        tolerance=search.tolerance,
        seed=search.seed,
        exact=search.exact,
        device=search.device,
    )
    return None if decomposition is None else spectrum_of_pair(pair, decomposition)


def _skipped(pairs: Pairs) -> list[Skipped]:
    """Tensors that have no spectrum, by name."""
    in_both = [Skipped(pair.name, pair.why or "taken whole") for pair in pairs.pairs if pair.layer is None]
    in_one = [Skipped(tensor.name, tensor.why) for tensor in pairs.unpaired]
    return sorted([*in_both, *in_one], key=lambda skipped: skipped.name)


def _reported(
    source: str,
    base: str | None,
    modules: Sequence[ModuleSpectrum],
    dtype: str,
    max_rank: int,
    *,
    unchanged: int = 0,
    skipped: Sequence[Skipped] = (),
    warnings: Sequence[str],
) -> SpectrumReport:
    table = rank_table(modules, dtype, max_rank)
    knee, why = knee_of(modules, table)
    return SpectrumReport(
        source=source,
        base=base,
        dtype=dtype,
        modules=tuple(modules),
        table=table,
        knee=knee,
        why=why,
        unchanged=unchanged,
        skipped=tuple(skipped),
        warnings=(*warnings, *_rounding_warning(modules)),
    )


def _rounding_warning(modules: Sequence[ModuleSpectrum]) -> list[str]:
    """A warning that most weights of changed modules are equal to the base's; None if they are not."""
    measured = [module.identical for module in modules if module.identical is not None]
    if not measured or sum(measured) <= len(measured) / 2:
        return []
    return [
        f"{sum(measured) / len(measured):.0%} of the weights of changed modules are bit for bit the base's: the "
        "update is smaller than the rounding of the checkpoint, and the noise edge says little"
    ]
