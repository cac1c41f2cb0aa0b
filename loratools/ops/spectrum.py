"""Show the singular values of an adapter or of a fine-tune, and what each rank would keep of it.

Of an adapter all singular values are known, from its factors. Of a pair of checkpoints the largest are, by certified
decompositions of the deltas; what all others hold together is known from the norms, so energies and errors are not
estimates: they are what an extraction at that rank would report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.adapter import Adapter
from loratools.arguments import Globs, Positive, checked
from loratools.checkpoints import Checkpoint, open_checkpoint
from loratools.errors import InputError, UsageError
from loratools.execution.local import run, single_threaded_torch, worker_count
from loratools.ops.common.arguments import RankFrom, load_adapter, stored_dtype
from loratools.ops.common.device import device_named, ensure_device
from loratools.ops.extract.rank_policy import ABOVE_EDGE
from loratools.ops.finetune.delta import Decomposed, Deltas, decomposed
from loratools.ops.finetune.pairs import Pair, line_up
from loratools.ops.lowrank.experts import apart
from loratools.ops.lowrank.factors import exact_factors, require_factors
from loratools.ops.lowrank.header_size import header_bytes
from loratools.short_repr import few_lines, one_line
from loratools.storage.held_inputs import holding_inputs
from loratools.storage.same import same_bytes
from loratools.tensors.dtypes import DTYPE_BITS
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from torch import Tensor

# Twice the rank takes away less than this share of what is lost: there is a knee.
_KNEE = 0.15
# ... and by so many times less than the doubling before.
_BEND = 2
# Lost below this share of the energy is rounding.
_NOTHING = 1e-10
_DEFAULT_MAX_RANK = 128


@dataclass(frozen=True)
class ModuleSpectrum:
    """The singular values of one module's change, descending, scale included; all of them where `complete`.

    norm            Frobenius, of the whole change.
    stable_rank     `||M||_F^2 / ||M||_2^2`.
    effective_rank  Roy and Vetterli's; with values unknown an estimate, mostly from above.
    numerical_rank  how many singular values rounding to the stored dtype cannot have made up; None where more than
                    are known may be.
    noise_edge      of a pair: the largest singular value of its rounding noise; `above_edge`: how many exceed it.
    optimal_cut     of a pair: Gavish and Donoho's for that noise; `above_cut`: how many exceed it.
    identical       of a pair: share of weights that are bit for bit the base's.
    cost            parameters of one unit of rank.
    """

    name: str
    shape: tuple[int, ...]
    singular_values: tuple[float, ...]
    complete: bool
    norm: float
    stable_rank: float
    effective_rank: float
    numerical_rank: int | None
    cost: int
    noise_edge: float | None = None
    above_edge: int | None = None
    optimal_cut: float | None = None
    above_cut: int | None = None
    identical: float | None = None

    def __repr__(self) -> str:
        return one_line(self)

    def energy(self, rank: int) -> float:
        """Share of the squared norm that a rank keeps."""
        kept = math.fsum(s * s for s in self.singular_values[:rank])
        if (self.complete and rank >= len(self.singular_values)) or not (self.norm**2):
            return 1.0
        return min(1.0, kept / self.norm**2)

    def to_dict(self) -> dict[str, object]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}


@dataclass(frozen=True)
class RankRow:
    """What one rank for all modules keeps: share of the energy, relative Frobenius error, the module that comes off
    worst, and the size of the file. `energy_shared`: the same size shared out by singular values (`--max-params`)."""

    rank: int
    energy: float
    error: float
    worst_module: str
    worst_energy: float
    bytes: int
    energy_shared: float


@dataclass(frozen=True)
class SpectrumReport:
    """`knee`: the rank beyond which there is little to gain, None where the spectrum has no such place; `why` says so
    either way."""

    source: str
    base: str | None
    dtype: str
    modules: tuple[ModuleSpectrum, ...]
    table: tuple[RankRow, ...]
    knee: int | None
    why: str
    unchanged: int
    skipped: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        return few_lines(self)

    def rows(self) -> list[dict[str, object]]:
        """Return one row per module, for a data frame: `pandas.DataFrame(report.rows())`."""
        return [module.to_dict() for module in self.modules]

    def to_dict(self) -> dict[str, object]:
        """The document of `loratools spectrum --json`, without its head."""
        return {
            "source": self.source,
            "base": self.base,
            "dtype": self.dtype,
            "modules": [m.to_dict() for m in self.modules],
            "table": [vars(row) for row in self.table],
            "knee": {"rank": self.knee, "why": self.why},
            "unchanged": self.unchanged,
            "skipped": [{"name": name, "why": why} for name, why in self.skipped],
            "warnings": list(self.warnings),
        }


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
    from_format: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> SpectrumReport:
    """Return the singular values of an adapter, or of the change from `base` to the fine-tuned model `source`.

    Args:
        source: An adapter, by its path or loaded; with `base`, a fine-tuned model.
        base: The model that `source` was fine-tuned from; None for an adapter.
        max_rank: The largest rank that is looked at; of an adapter, the largest that is in the table.
        dtype: The dtype that the size of a file is told for: float32, bfloat16, float16 or float64.
        tolerance: Share of the captured energy that a better decomposition may probably still find, between 0 and 1.
            Smaller takes more passes over each change.
        exact: Find all singular values of a pair, by exact methods: slower.
        seed: Random seed of the decomposition. Equal input and seed give an equal result.
        threads: Workers; one per CPU where it is None. The result does not depend on it.
        device: What decomposes: cpu, cuda, cuda:N, or auto.
        include: Globs over the names of modules; all are taken where there is none.
        exclude: Globs of what is left out.
        rank_from: `tensors` or `config`: which rank makes the scale, where the two disagree.
        from_format: The format of the adapters, where it is not to be found from the content.
        progress: Called with the number of bytes just read.

    Returns:
        A report with the singular values of each module, and what each rank would keep (share of the squared Frobenius
        norm), lose (relative Frobenius error) and take (bytes).

    Raises:
        UsageError: A model without its base, or an adapter with one.
        InputError: Nothing changed, or values that are not finite.
        MismatchError: Names or shapes of the two models do not fit each other.
        UnsupportedError: A model is quantised in a way that is not read, or the scale of the adapter is uncertain.

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
        adapter = load_adapter(source, rank_from=rank_from, from_format=from_format).selected(include, exclude)
        modules = _of_adapter(adapter, workers, progress)
        return _report(adapter.name, None, stored, modules, max_rank, 0, [], adapter.warnings)
    if isinstance(source, Adapter):
        raise UsageError("an adapter has its spectrum without a base", hint="leave the base away")
    before, after = (c if isinstance(c, Checkpoint) else open_checkpoint(Path(c)) for c in (base, source))
    pairs = line_up(before, after, include=include, exclude=exclude)
    chosen = [p for p in pairs.pairs if p.layer is not None]

    def work(pair: Pair) -> ModuleSpectrum | None:
        from loratools.algebra.rank_rules import Fixed

        found = None
        if not same_bytes(pair.base, pair.tuned):
            deltas = Deltas(pair.name, pair.base, pair.tuned, pair.matrices)
            rule = Fixed(min(max_rank, *pair.matrices[1:]))
            seen = decomposed(deltas, rule, tolerance=tolerance, seed=seed, exact=exact, device=named)
            found = None if seen is None else _of_pair(pair, seen)
        if progress is not None:
            progress(pair.nbytes)
        return found

    named = device_named(device)
    ordered = sorted(chosen, key=lambda p: (-p.nbytes, p.name))
    with single_threaded_torch():
        found = [m for m in run(ordered, work, threads=workers) if m is not None]
    if not found:
        raise InputError(
            f"no weight of a layer of '{after.name}' differs from '{before.name}'",
            hint="give the fine-tuned model first, and what it was trained from as --base",
        )
    skipped = [(p.name, p.why or "taken whole") for p in pairs.pairs if p.layer is None]
    skipped += [(a.name, a.why) for a in pairs.alone]
    modules = sorted(found, key=lambda m: m.name)
    unchanged = len(chosen) - len(found)
    return _report(after.name, before.name, stored, modules, max_rank, unchanged, skipped, pairs.warnings)


def _of_adapter(adapter: Adapter, workers: int, progress: Callable[[int], None] | None) -> list[ModuleSpectrum]:
    def work(item: tuple[str, Update]) -> ModuleSpectrum:
        from loratools.algebra.lowrank import noise_of_factors, singular_values

        name, update = item
        factors = exact_factors(update, name, adapter.name)
        values = singular_values(factors)
        # An entry of a factor is a product of at most all stored parts but those of the other factor.
        unit = max(_epsilon(t.dtype) for t in update.parts.values()) * max(1, len(update.parts) - 1)
        real = int((values > noise_of_factors(factors, unit)).sum())
        shape = (factors.out_features, factors.in_features)
        if progress is not None:
            progress(sum(t.nbytes for t in update.parts.values()))
        own = tuple(size for size in update.shape if size is not None)
        return _module(name, own, values, 0.0, shape, real, complete=True, count=1)

    # Each of the experts that one parameter holds is a matrix of its own, with a spectrum of its own.
    updates, _ = apart(adapter.updates)
    require_factors(updates.items())
    if not updates:
        raise InputError(f"'{adapter.name}' has no updates, only replaced weights: there is no spectrum")
    with single_threaded_torch():
        return run(list(updates.items()), work, threads=workers)


def _of_pair(pair: Pair, seen: Decomposed) -> ModuleSpectrum:
    from loratools.algebra.lowrank import numerical_rank
    from loratools.algebra.spectrum import gavish_donoho_cut

    rounding = seen.rounding
    values = seen.spectrum
    count, rows, columns = pair.matrices
    exact = all(p is None or p.method in ("gram", "dense") for p in seen.parts)
    if exact:
        values = seen.all_values
    complete = exact or seen.norm**2 - float(values.square().sum()) <= _NOTHING * seen.norm**2
    tail = 0.0 if complete else max(0.0, seen.norm**2 - float(values.square().sum()))
    edge = rounding.edge((rows, columns))
    cut = gavish_donoho_cut(rounding.noise, (rows, columns))
    # Of experts, the noise of all adds up.
    spread = math.sqrt(count)
    real = numerical_rank(values, (rows, columns), _epsilon("F32"))
    known = _module(pair.target, pair.base.shape, values, tail, (rows, columns), real, complete=complete, count=count)
    above = [int((values > spread * ABOVE_EDGE * edge).sum()), int((values > spread * cut).sum())]
    return ModuleSpectrum(
        **{
            **vars(known),
            "noise_edge": spread * edge,
            "above_edge": above[0],
            "optimal_cut": spread * cut,
            "above_cut": above[1],
            "identical": rounding.identical / max(1, rounding.elements),
        }
    )


def _module(
    name: str,
    own_shape: tuple[int, ...],
    values: Tensor,
    tail: float,
    shape: tuple[int, int],
    numerical: int,
    *,
    complete: bool,
    count: int,
) -> ModuleSpectrum:
    from loratools.algebra.spectrum import effective_rank_estimate

    energy = float(values.square().sum()) + tail
    largest = float(values[0]) if values.numel() else 0.0
    unknown = 0 if complete else min(shape) - len(values)
    return ModuleSpectrum(
        name=name,
        shape=own_shape,
        singular_values=tuple(values.tolist()),
        complete=complete,
        norm=math.sqrt(energy),
        stable_rank=energy / largest**2 if largest else 0.0,
        effective_rank=effective_rank_estimate(values, tail, unknown),
        numerical_rank=numerical if complete or numerical < len(values) else None,
        cost=count * sum(shape),
    )


def _epsilon(dtype: str) -> float:
    return {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8, "F8_E5M2": 2.0**-3}.get(dtype, 2.0**-4)


def _report(
    source: str,
    base: str | None,
    dtype: str,
    modules: Sequence[ModuleSpectrum],
    max_rank: int,
    unchanged: int,
    skipped: Sequence[tuple[str, str]],
    warnings: Sequence[str],
) -> SpectrumReport:
    table = _table(modules, dtype, max_rank)
    knee, why = _knee(modules, table)
    told = list(warnings)
    measured = [m.identical for m in modules if m.identical is not None]
    if measured and sum(measured) > len(measured) / 2:
        told.append(
            f"{sum(measured) / len(measured):.0%} of the weights of changed modules are bit for bit the base's: the "
            "update is smaller than the rounding of the checkpoint, and the noise edge says little"
        )
    return SpectrumReport(
        source=source,
        base=base,
        dtype=dtype,
        modules=tuple(modules),
        table=table,
        knee=knee,
        why=why,
        unchanged=unchanged,
        skipped=tuple(sorted(skipped)),
        warnings=tuple(told),
    )


def _table(modules: Sequence[ModuleSpectrum], dtype: str, max_rank: int) -> tuple[RankRow, ...]:
    import torch

    from loratools.algebra.allocation import allocate

    total = math.fsum(m.norm**2 for m in modules)
    longest = min(max_rank, max(len(m.singular_values) for m in modules))
    ranks = [2**i for i in range(longest.bit_length()) if 2**i < longest] + [longest]
    spectra = [torch.tensor(m.singular_values, dtype=torch.float64) for m in modules]
    names = header_bytes([m.name for m in modules])
    rows = []
    for rank in ranks:
        energies = [m.energy(rank) for m in modules]
        lost = math.fsum(m.norm**2 * (1 - e) for m, e in zip(modules, energies, strict=True)) / total if total else 0.0
        used = [min(rank, len(s)) for s in spectra]
        parameters = sum(r * m.cost for r, m in zip(used, modules, strict=True))
        shared = allocate(spectra, [m.cost for m in modules], parameters)
        kept = math.fsum(m.norm**2 * m.energy(r) for m, r in zip(modules, shared, strict=True))
        worst = min(range(len(modules)), key=lambda i: (energies[i], modules[i].name))
        rows.append(
            RankRow(
                rank=rank,
                energy=1 - lost,
                error=math.sqrt(max(0.0, lost)),
                worst_module=modules[worst].name,
                worst_energy=energies[worst],
                bytes=parameters * DTYPE_BITS[dtype] // 8 + names,
                energy_shared=kept / total if total else 1.0,
            )
        )
    return tuple(rows)


def _knee(modules: Sequence[ModuleSpectrum], table: Sequence[RankRow]) -> tuple[int | None, str]:
    """The smallest rank of the table at which twice as much hardly helps, and a sentence for people."""
    if not any(m.norm for m in modules):
        return None, "there is no change to hold: every singular value is 0, as before training"
    for row in table:
        if row.error**2 <= _NOTHING:
            return row.rank, f"rank {row.rank} holds all of the change, to rounding"
    doublings = [(a, b, 1 - (b.error / a.error) ** 2) for a, b in pairwise(table) if b.rank == 2 * a.rank]
    last = table[-1].rank
    if not doublings:
        return None, f"there is no larger rank to compare rank {last} with"
    # Where what a doubling takes away of the lost energy falls most, to little: a spectrum may begin flat as well.
    before = [table[0].energy, *(gain for _, _, gain in doublings)]
    bends = [
        (had / max(gain, _NOTHING), row, twice)
        for had, (row, twice, gain) in zip(before, doublings, strict=False)
        if gain < _KNEE and had > _BEND * gain
    ]
    if not bends:
        least = min(gain for _, _, gain in doublings)
        return None, (
            f"no knee up to rank {last}: every doubling still takes away {least:.0%} or more of what is lost; choose "
            "by size or by error"
        )
    _, row, twice = max(bends, key=lambda bend: bend[0])
    edges = sorted(m.above_edge for m in modules if m.above_edge is not None)
    noise = bool(edges) and edges[len(edges) // 2] <= row.rank
    return row.rank, (
        f"rank {twice.rank} takes twice the file and lifts the energy from {row.energy:.2%} to {twice.energy:.2%}"
        + ("; in half of the modules, what is beyond is the checkpoint's own rounding" if noise else "")
    )
