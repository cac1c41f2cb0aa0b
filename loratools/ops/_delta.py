"""One tensor on two sides: whether it changed, by how much, and the delta of a matrix as certified factors.

Bytes are compared before anything is decoded, since most of a model is often unchanged. A delta is formed in float32,
where the difference of two bfloat16 numbers is exact (their exponents would have to differ by more than 16 for it not
to be); of float64 tensors in float64.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.errors import InputError
from loratools.tensors import LazyTensor, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as TorchDtype

# Elements of a block of rows, where a result is summed up and not kept.
_BLOCK = 1 << 18
# Below this, the residual in float32 is mostly the rounding of float32.
_ROUNDING = 1e-3


@dataclass(frozen=True, eq=False)
class Extracted:
    """Factors as they will be stored, `b: (out, rank)` and `a: (rank, in)`, and what was measured on them.

    norm: Frobenius norm of the delta. error: `||delta - b @ a|| / norm`.
    gap_bound, gap_estimate: how much more of the squared norm the best decomposition of this rank could capture
        (`algebra.svd.TruncatedSvd`).
    """

    b: Tensor
    a: Tensor
    norm: float
    error: float
    gap_bound: float
    gap_estimate: float


def delta_of(name: str, base: LazyTensor, tuned: LazyTensor, rows: tuple[int, int] | None = None) -> Tensor:
    """`tuned - base`, of all rows or of some; in memory of the calling thread that its next delta overwrites.

    Fresh memory for each would cost more in page faults than the decomposition of the delta.

    Raises:
        InputError: values that are not finite.
    """
    dtype = torch_dtype("F64" if "F64" in (base.dtype, tuned.dtype) else "F32")
    if not base.shape:
        delta = tuned.read().to(dtype) - base.read()
    else:
        start, stop = rows if rows is not None else (0, base.shape[0])
        delta = _memory.sized((stop - start, *base.shape[1:]), dtype)
        for first, last in _blocks(base, stop, start):
            piece = delta[first - start : last - start]
            piece.copy_(tuned.read_rows(first, last))
            piece.sub_(base.read_rows(first, last))
    ensure_finite(name, delta)
    return delta


class _Memory(threading.local):
    values: Tensor | None = None

    def sized(self, shape: tuple[int, ...], dtype: TorchDtype) -> Tensor:
        import torch

        elements = math.prod(shape)
        if self.values is None or self.values.dtype != dtype or self.values.numel() < elements:
            self.values = None  # the old one goes before the new one comes
            self.values = torch.empty(elements, dtype=dtype)
        return self.values[:elements].view(shape)


_memory = _Memory()


def ensure_finite(name: str, values: Tensor) -> None:
    """Raise InputError where a value is NaN or infinite."""
    # One such value makes the sum one; finite values hardly ever do, and then a second look tells.
    if not math.isfinite(float(values.sum())) and not values.isfinite().all():
        raise InputError(
            f"'{name}' has values that are not finite",
            hint="the training diverged, or a file is damaged; compare its checksum with the original's",
        )


def change(name: str, base: LazyTensor, tuned: LazyTensor) -> float:
    """Frobenius norm of the change, block by block; rows that only one side has count as they are."""
    shared = min(base.shape[0], tuned.shape[0]) if base.shape else 1
    total = 0.0
    for start, stop in _blocks(base, shared):
        total += _squares(delta_of(name, base, tuned, (start, stop) if base.shape else None))
    longer = max(base, tuned, key=lambda t: t.shape[0] if t.shape else 0)
    if longer.shape and longer.shape[0] > shared:
        total += norm(name, longer, shared) ** 2
    return math.sqrt(total)


def norm(name: str, tensor: LazyTensor, start: int = 0) -> float:
    """Frobenius norm of the rows from `start` on, block by block."""
    total = 0.0
    for first, stop in _blocks(tensor, tensor.shape[0] if tensor.shape else 1, start):
        values = (tensor.read_rows(first, stop) if tensor.shape else tensor.read()).double()
        ensure_finite(name, values)
        total += _squares(values)
    return math.sqrt(total)


def extracted(
    delta: Tensor, rank: int, *, transposed: bool, dtype: str, tolerance: float | None, seed: int, exact: bool
) -> Extracted | None:
    """Factors of the delta, (out, in), or (in, out) where `transposed`; None for a delta of zeros."""
    from loratools.algebra.svd import truncated_svd

    options = {} if tolerance is None else {"tolerance": tolerance}
    found = truncated_svd(delta, rank, seed=seed, exact=exact, **options)
    if not found.norm:
        return None
    root = found.s.sqrt()
    left = (found.u * root).to(torch_dtype(dtype))
    right = (root[:, None] * found.vt).to(torch_dtype(dtype))
    error = _residual(delta, left, right, found.norm) / found.norm
    b, a = (right.mT, left.mT) if transposed else (left, right)
    return Extracted(b.contiguous(), a.contiguous(), found.norm, error, found.gap_bound, found.gap_estimate)


def _residual(delta: Tensor, left: Tensor, right: Tensor, norm: float) -> float:
    """`||delta - left @ right||`, formed block by block.

    `||delta||^2 - 2 <delta, left @ right> + ||left @ right||^2` would cost the same product, and cancel.
    """
    fast = _residual_in(delta, left.float(), right.float())
    if fast > _ROUNDING * norm:
        return fast
    return _residual_in(delta, left.double(), right.double())


def _residual_in(delta: Tensor, left: Tensor, right: Tensor) -> float:
    import torch

    rows = max(1, _BLOCK // delta.shape[1])
    total = 0.0
    for start in range(0, delta.shape[0], rows):
        piece, part = delta[start : start + rows].to(left.dtype), left[start : start + rows]
        total += _squares(torch.addmm(piece, part, right, alpha=-1))
    return math.sqrt(total)


def _squares(values: Tensor) -> float:
    """Sum of squares of one block: by rows in its own precision, of the rows in float64."""
    import torch

    if values.dim() < 2:
        return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
    return float(torch.linalg.vector_norm(values.flatten(1), dim=1).double().square().sum())


def _blocks(tensor: LazyTensor, stop: int, start: int = 0) -> list[tuple[int, int]]:
    per_row = tensor.elements // tensor.shape[0] if tensor.shape and tensor.shape[0] else 1
    step = max(1, _BLOCK // max(1, per_row))
    return [(at, min(at + step, stop)) for at in range(start, stop, step)]
