"""The arithmetic of a merge: rows of the base plus rows of the updates, in float32, rounded once.

Blocks are small enough that the base's rows, the delta, the sum and the result stay in one core's cache; larger ones
ran at half the speed. Their size is fixed, so that the bytes of the result do not depend on the number of workers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from loratools.errors import InputError
from loratools.plan import Output, RowsUnit, WeightedUpdate
from loratools.storage.files import read_into, write_at
from loratools.tensors import LazyTensor, torch_dtype
from loratools.updates import Delta
from loratools.updates._factored import FactorDelta, joined

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as TorchDtype

_BLOCK_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Gain:
    """What became of an update: sums over weights, that add up over units.

    along     <merged - base, dW>
    energy    <dW, dW>
    still     weights whose stored value is what it was
    """

    along: float = 0.0
    energy: float = 0.0
    still: int = 0
    weights: int = 0

    def __add__(self, other: Gain) -> Gain:
        return Gain(
            self.along + other.along,
            self.energy + other.energy,
            self.still + other.still,
            self.weights + other.weights,
        )

    @property
    def gain(self) -> float | None:
        """1 where all of the update survived the rounding, 0 where none did; None where there was no update."""
        return self.along / self.energy if self.energy > 0 else None

    @property
    def unchanged_share(self) -> float | None:
        return self.still / self.weights if self.weights else None


def compute_dtype(output: Output) -> TorchDtype:
    """float32, save for weights stored in float64."""
    import torch

    return torch.float64 if "F64" in (output.dtype, output.values.dtype) else torch.float32


def prepared(updates: Sequence[WeightedUpdate], dtype: TorchDtype) -> list[Delta]:
    """The updates of one weight, ready to give their rows; all that have factors as one."""
    deltas = [u.update.prepare(transposed=u.transposed, weight=u.weight, dtype=dtype) for u in updates]
    factored = [d for d in deltas if isinstance(d, FactorDelta)]
    others = [d for d in deltas if not isinstance(d, FactorDelta)]
    return [*([joined(factored)] if factored else []), *others]


def merge_rows(unit: RowsUnit, fd: int, offset: int, *, progress: Callable[[int], None]) -> Gain:
    """Compute the rows of `unit` and write them to `fd`; `offset` is where the whole tensor begins.

    Raises:
        InputError: a weight does not fit the stored dtype, or is not finite in the base.
    """
    import torch

    output = unit.output
    dtype = compute_dtype(output)
    deltas = prepared(output.updates, dtype)
    columns = output.row_bytes // (torch_dtype(output.dtype).itemsize)
    step = max(1, _BLOCK_ELEMENTS // max(1, columns))
    total = Gain()
    for start in range(unit.start, unit.stop, step):
        stop = min(start + step, unit.stop)
        buffers = _buffers.sized(output, dtype, stop - start, columns)
        base = buffers.base
        _read(output.values, start, stop, buffers)
        if deltas:
            delta = _sum_of_rows(deltas, start, stop, buffers.delta)
            moved = torch.add(base, delta, out=buffers.moved)
            buffers.stored.copy_(moved)
            moved.copy_(buffers.stored).sub_(base)
            block = Gain(
                float(moved.view(-1) @ delta.view(-1)),
                float(delta.view(-1) @ delta.view(-1)),
                buffers.still(),
                moved.numel(),
            )
            if not _finite(block):
                _refuse(output, base, base + delta)
            total += block
        else:
            buffers.stored.copy_(base)
            if not buffers.stored.isfinite().all() and base.isfinite().all():
                _refuse(output, base, base)
        write_at(fd, buffers.stored_bytes, offset + start * output.row_bytes)
        progress((stop - start) * output.row_bytes)
    return total


def _sum_of_rows(deltas: Sequence[Delta], start: int, stop: int, out: Tensor) -> Tensor:
    total = deltas[0].rows(start, stop, out=out)
    for delta in deltas[1:]:
        total += delta.rows(start, stop)
    return total


def _finite(gain: Gain) -> bool:
    # Any infinity or nan among the merged weights makes this sum not finite, so it serves as the check of them all.
    return abs(gain.along) < float("inf")


def _refuse(output: Output, base: Tensor, exact: Tensor) -> NoReturn:
    """Say what is not finite: the base, the result, or only the sum of squares of the update."""
    if not base.isfinite().all():
        raise InputError(f"'{output.name}' of the base holds values that are not finite")
    largest = float(exact.abs().max())
    limit = float(_finfo_max(output.dtype))
    if largest <= limit:
        raise InputError(
            f"'{output.name}' would reach {largest:.4g}, which no trained weight does",
            hint="look at the adapter's alpha and weight",
        )
    raise InputError(
        f"'{output.name}' would reach {largest:.4g}, and {output.dtype} ends at {limit:.4g}",
        hint="look at the adapter's alpha and weight, or store the result with --dtype bfloat16 or float32",
    )


def _finfo_max(dtype: str) -> float:
    import torch

    return torch.finfo(torch_dtype(dtype)).max


class _Buffers:
    """Memory for one block, reused from block to block: fresh memory would cost more in page faults than the sums.

    raw       as read                 base     the same in the dtype of the sums
    delta     the updates' rows       moved    base + delta, then how far the stored value moved
    stored    as written
    """

    def __init__(self, read_as: str, stored_as: str, dtype: TorchDtype, rows: int, columns: int) -> None:
        import torch

        self.key = (read_as, stored_as, dtype, rows, columns)
        self.raw = torch.empty(rows, columns, dtype=torch_dtype(read_as))
        self.raw_bytes = self.raw.view(torch.uint8).numpy().data
        self.base = torch.empty(rows, columns, dtype=dtype)
        self.delta = torch.empty(rows, columns, dtype=dtype)
        self.moved = torch.empty(rows, columns, dtype=dtype)
        self.stored = torch.empty(rows, columns, dtype=torch_dtype(stored_as))
        self.stored_bytes = self.stored.view(torch.uint8).numpy().data

    def still(self) -> int:
        """Weights that did not move. numpy counts five times faster than torch."""
        import numpy as np

        return self.moved.numel() - int(np.count_nonzero(self.moved.numpy() != 0))


class _ThreadBuffers(threading.local):
    """Each worker's own buffers: those of the last shape of block, since blocks of one shape follow each other."""

    last: _Buffers | None = None

    def sized(self, output: Output, dtype: TorchDtype, rows: int, columns: int) -> _Buffers:
        key = (output.values.dtype, output.dtype, dtype, rows, columns)
        if self.last is None or self.last.key != key:
            self.last = _Buffers(*key)
        return self.last


_buffers = _ThreadBuffers()


def _read(values: LazyTensor, start: int, stop: int, buffers: _Buffers) -> None:
    if values.location is not None:
        row_bytes = buffers.raw_bytes.nbytes // (stop - start)
        read_into(values.location, start * row_bytes, buffers.raw_bytes)
        buffers.base.copy_(buffers.raw)
    else:
        buffers.base.copy_(values.read_rows(start, stop).reshape(buffers.base.shape))
