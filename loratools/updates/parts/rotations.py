"""Orthogonal matrices of small blocks, in float64: Cayley's map, and products with blocks along a diagonal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats


def cayley(skew: Floats) -> Floats:
    """Return Cayley's map of skew-symmetric matrices, `(I - Q)(I + Q)^-1`: (..., size, size)."""
    import numpy as np

    identity = np.eye(skew.shape[-1])
    # (I - Q)(I + Q)^-1 is the transpose of (I + Q)'^-1 (I - Q)', and Q' is -Q.
    solved: Floats = np.linalg.solve(identity - skew, identity + skew)
    rotation: Floats = solved.swapaxes(-1, -2)
    return rotation


def times_blocks(values: Floats, blocks: Floats) -> Floats:
    """Multiply with a block-diagonal matrix: `values @ diag(blocks)`. values: (rows, count x size), blocks:
    (count, size, size)."""
    import numpy as np

    count, size, _ = blocks.shape
    product: Floats = np.einsum("rki,kij->rkj", values.reshape(-1, count, size), blocks, optimize=True)
    return product.reshape(values.shape)
