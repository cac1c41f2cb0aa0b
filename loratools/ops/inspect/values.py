"""What only the values tell: norms and spectra of an update, and how many values are not finite."""

from __future__ import annotations

from collections.abc import Callable

from loratools.ops.inspect.entries import Values
from loratools.tensors.dtypes import DTYPE_BITS
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.protocol import Update

# Large enough that the disk is the limit, small enough that memory does not grow with the tensor.
_BLOCK_BYTES = 16 << 20


def update_values(update: Update) -> Values:
    from loratools.algebra import lowrank, spectrum

    factors = update.factors()
    if factors is None:
        return Values(None, None, None, None, None, None, None)
    # Before the decomposition, which has no answer for such input. A sum is not finite if a term is not.
    if not all(bool(f.isfinite().all()) for f in (factors.a, factors.b)):
        return Values(None, None, None, None, None, finite=False, zero=False)
    s = lowrank.singular_values(factors)
    zero = not bool(s.any())
    return Values(
        norm=float(s.norm()),
        spectral_norm=float(s.max()) if s.numel() else 0.0,
        stable_rank=spectrum.stable_rank(s),
        effective_rank=spectrum.effective_rank(s),
        singular_values=tuple(s.tolist()),
        finite=True,
        zero=zero,
        zero_rows=int((~factors.b.any(dim=1)).sum()),
    )


def non_finite_count(tensor: LazyTensor, progress: Callable[[int], None]) -> int | None:
    """How many values are NaN or infinite, a block of rows at a time; None for packed values, which only their scheme
    can tell."""
    if tensor.dtype in ("F4", "F6_E2M3", "F6_E3M2"):
        return None
    if not tensor.dtype.startswith(("F", "BF", "C")):
        return 0
    count = 0
    blocks = max(1, -(-tensor.nbytes // _BLOCK_BYTES))
    rows = -(-tensor.shape[0] // blocks) if tensor.shape else 1
    for start in range(0, tensor.shape[0] if tensor.shape else 1, rows or 1):
        block = tensor.source.read_rows(start, min(start + rows, tensor.shape[0] if tensor.shape else 1))
        # torch has no isfinite for the dtypes of one byte; float32 holds them exactly.
        block = block.float() if block.element_size() == 1 else block
        count += int((~block.isfinite()).sum())
        progress(block.numel() * DTYPE_BITS[tensor.dtype] // 8)
    return count
