"""The memory and time that an extraction will need, estimated from the shapes of its tensors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from loratools.ops.extract.rank_policy import RankPolicy
from loratools.ops.finetune.pairs import Pair

# For a randomised decomposition: typical columns beyond the rank, and reads of the delta.
_OVERSAMPLING = 16
_PASSES = 10
# If values choose the rank, the work for this rank is assumed.
_ASSUMED = 64
# Other work (reading, comparing, small decompositions), as a multiple of the products.
_OTHER_WORK = 2.0
# Memory of a Python process that has imported torch.
_START = 350_000_000


@dataclass(frozen=True)
class Cost:
    """The expected memory and time of an extraction.

    Attributes:
        memory: Peak memory in bytes.
        seconds: Time of the decompositions in seconds, estimated from the speed of one small product on this machine.
    """

    memory: int
    seconds: float


def cost_of(pairs: Sequence[Pair], policy: RankPolicy, workers: int) -> Cost:
    """Every tensor is assumed to have changed."""
    work, held_bytes = 0.0, 0
    sizes = []
    for pair in pairs:
        if pair.layer is None:
            continue
        count, rows, columns = pair.matrices
        smaller = min(rows, columns)
        rank = policy.planned(smaller) or min(_ASSUMED, smaller)
        basis = min(smaller, _PASSES // 2 * (rank + _OVERSAMPLING))
        # A product takes two operations per entry and column; the exact method is bounded by the smaller side.
        work += count * min(2.0 * rows * columns * _PASSES * (rank + _OVERSAMPLING), 12.0 * rows * columns * smaller)
        held_bytes += 4 * rank * count * (rows + columns)
        # The delta in float32, the basis in float32, its image in float64, and both sides of a block as they are read.
        # For a stack of experts, one at a time.
        sizes.append(4 * rows * columns + 4 * basis * rows + 8 * basis * columns + (8 << 20))
    at_once = sum(sorted(sizes, reverse=True)[: workers + 1])
    return Cost(_START + at_once + held_bytes, _OTHER_WORK * work / (_speed() * workers))


def _speed() -> float:
    """Operations per second of one thread, measured on a product like those of a decomposition."""
    import torch

    from loratools.execution.local import single_threaded_torch

    x, y = torch.ones(1024, 1024), torch.ones(1024, 64)
    with single_threaded_torch():
        x @ y
        start = time.perf_counter()
        for _ in range(10):
            x @ y
        elapsed = time.perf_counter() - start
    return 10 * 2 * x.numel() * y.shape[1] / elapsed
