"""What one rank for all modules would keep of them, and from which rank on more hardly helps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from loratools.ops.lowrank.header_size import header_bytes
from loratools.ops.spectrum.report import ModuleSpectrum, RankRow
from loratools.tensors.dtypes import DTYPE_BITS

# Twice the rank takes away less than this share of what is lost: there is a knee.
_KNEE = 0.15
# ... and by this factor less than the doubling before.
_BEND = 2
# Energy below this share of all is rounding.
_ROUNDING = 1e-10


def rank_table(modules: Sequence[ModuleSpectrum], dtype: str, max_rank: int) -> tuple[RankRow, ...]:
    """What ranks of 1, 2, 4 and so on up to `max_rank`, the same for all modules, keep and cost.

    Args:
        modules: The spectra of all modules.
        dtype: The dtype of the stored factors, for the size of the file.
        max_rank: The largest rank to look at.
    """
    import torch

    from loratools.algebra.allocation import allocate

    total = math.fsum(m.norm**2 for m in modules)
    longest = min(max_rank, max(len(m.singular_values) for m in modules))
    ranks = [2**i for i in range(longest.bit_length()) if 2**i < longest] + [longest]
    spectra = [torch.tensor(m.singular_values, dtype=torch.float64) for m in modules]
    header = header_bytes([m.name for m in modules])
    rows = []
    for rank in ranks:
        energies = [m.energy(rank) for m in modules]
        lost = math.fsum(m.norm**2 * (1 - e) for m, e in zip(modules, energies, strict=True)) / total if total else 0.0
        used = [min(rank, len(s)) for s in spectra]
        parameters = sum(r * m.cost for r, m in zip(used, modules, strict=True))
        shared = allocate(spectra, [m.cost for m in modules], parameters)
        captured = math.fsum(m.norm**2 * m.energy(r) for m, r in zip(modules, shared, strict=True))
        worst = min(range(len(modules)), key=lambda i: (energies[i], modules[i].name))
        rows.append(
            RankRow(
                rank=rank,
                energy=1 - lost,
                error=math.sqrt(max(0.0, lost)),
                worst_module=modules[worst].name,
                worst_energy=energies[worst],
                bytes=parameters * DTYPE_BITS[dtype] // 8 + header,
                energy_shared=captured / total if total else 1.0,
            )
        )
    return tuple(rows)


def knee_of(modules: Sequence[ModuleSpectrum], table: Sequence[RankRow]) -> tuple[int | None, str]:
    """The smallest rank of the table at which twice as much hardly helps, and a sentence for people."""
    if not any(m.norm for m in modules):
        return None, "there is no change to hold: every singular value is 0, as before training"
    for row in table:
        if row.error**2 <= _ROUNDING:
            return row.rank, f"rank {row.rank} holds all of the change, to rounding"
    doublings = [(a, b, 1 - (b.error / a.error) ** 2) for a, b in pairwise(table) if b.rank == 2 * a.rank]
    last = table[-1].rank
    if not doublings:
        return None, f"there is no larger rank to compare rank {last} with"
    # Where what a doubling takes away of the lost energy falls most, to little: a spectrum may begin flat as well.
    before = [table[0].energy, *(gain for _, _, gain in doublings)]
    bends = [
        (had / max(gain, _ROUNDING), row, twice)
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
