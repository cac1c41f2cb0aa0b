"""What an extraction will need, from the shapes of its tensors: memory, and time as far as that can be told."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from loratools.ops.extract.rank_policy import RankPolicy
from loratools.ops.finetune.pairs import Pair

# Of a randomised decomposition: columns beyond the rank, and reads of the delta, as they mostly are.
_OVERSAMPLING = 16
_PASSES = 10
# Where a rule of values chooses, as much work as of this rank is assumed.
_ASSUMED = 64
# Work beside the products (reading, comparing, small decompositions), as a multiple of them.
_OTHER_WORK = 2.0
# Of a Python with torch imported.
_START = 350_000_000


@dataclass(frozen=True)
class Cost:
    """What an extraction is expected to take.

    Attributes:
        memory: Memory at the peak, in bytes.
        seconds: The time of the decompositions, estimated from the speed of one small product on this machine.
    """

    memory: int
    seconds: float


def cost_of(pairs: Sequence[Pair], policy: RankPolicy, workers: int) -> Cost:
    """Every tensor is taken to have changed."""
    work, held_bytes = 0.0, 0
    sizes = []
    for pair in pairs:
        if pair.layer is None:
            continue
        count, rows, columns = pair.matrices
        smaller = min(rows, columns)
        rank = policy.planned(smaller) or min(_ASSUMED, smaller)
        basis = min(smaller, _PASSES // 2 * (rank + _OVERSAMPLING))
        # A product takes two operations for each entry and column; the exact way is bounded by the smaller side.
        work += count * min(2.0 * rows * columns * _PASSES * (rank + _OVERSAMPLING), 12.0 * rows * columns * smaller)
        held_bytes += 4 * rank * count * (rows + columns)
        # The delta in float32, the basis in float32, its image in float64, and both sides of a block as they are read.
        # Of a stack of experts one at a time.
        sizes.append(4 * rows * columns + 4 * basis * rows + 8 * basis * columns + (8 << 20))
    at_once = sum(sorted(sizes, reverse=True)[: workers + 1])
    return Cost(_START + at_once + held_bytes, _OTHER_WORK * work / (_speed() * workers))


def _speed() -> float:
    """Operations per second of one thread, in a product like those of a decomposition."""
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
