"""Whether two tensors are the same, byte for byte."""

from __future__ import annotations

from loratools.storage.files import read_into
from loratools.tensors.lazy import LazyTensor

# A tensor that changed shows it early, so the first look is short; then pieces that stay in the cache.
_FIRST_PIECE_BYTES = 1 << 16
_PIECE_BYTES = 1 << 20
# Of a view: some read a whole tensor for any range of their rows.
_VIEWED = 1 << 26


def same_bytes(first: LazyTensor, second: LazyTensor) -> bool:
    """Whether dtype, shape and every byte are equal: a NaN equals itself, and 0 is not -0.

    Bytes in files are compared as they stream by, without torch.
    """
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    a, b = first.location, second.location
    if a is None or b is None:
        return _same_values(first, second)
    # One pair of buffers for all pieces: fresh memory for each would be cleared by the system first.
    first_buffer, second_buffer = bytearray(min(_PIECE_BYTES, a.nbytes)), bytearray(min(_PIECE_BYTES, a.nbytes))
    start, step = 0, _FIRST_PIECE_BYTES
    while start < a.nbytes:
        size = min(step, a.nbytes - start)
        if size < len(first_buffer):
            first_piece, second_piece = memoryview(first_buffer)[:size], memoryview(second_buffer)[:size]
        else:
            first_piece, second_piece = memoryview(first_buffer), memoryview(second_buffer)
        read_into(a, start, first_piece)
        read_into(b, start, second_piece)
        # Whole buffers are compared as memory; views would be compared item by item.
        if (first_buffer != second_buffer) if size == len(first_buffer) else bytes(first_piece) != bytes(second_piece):
            return False
        start, step = start + size, _PIECE_BYTES
    return True


def _same_values(first: LazyTensor, second: LazyTensor) -> bool:
    import torch

    rows = first.shape[0] if first.shape else 1
    step = max(1, _VIEWED * rows // max(1, first.nbytes))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        pieces = (t.read_rows(start, stop) if t.shape else t.read() for t in (first, second))
        if not torch.equal(*(piece.reshape(-1).view(torch.uint8) for piece in pieces)):
            return False
    return True
