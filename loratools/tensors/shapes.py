"""Shapes of tensors: as people read them, and what two of them have in common."""

from __future__ import annotations

from collections.abc import Sequence


def shape_text(shape: Sequence[int | None]) -> str:
    """Return a shape in words.

    `(3, 4)` -> `3x4`; a size that is not known is `?`.
    """
    return "x".join("?" if size is None else str(size) for size in shape) or "a scalar"


def without_unit_kernel(shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """The shape without a kernel of one element: such a convolution may be stored as a linear layer."""
    return shape[:2] if all(size == 1 for size in shape[2:]) else shape
