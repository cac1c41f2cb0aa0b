"""Putting a scale or a rank where a format has a place for it: exact but for one rounding to the stored dtype.

Every function gives an update with the same delta. What it multiplies it multiplies in float64, and rounds once; a
power of two costs no rounding at all. What does not change keeps its tensor, and with it its bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from loratools.errors import UnsupportedError
from loratools.storage.casting import narrowed
from loratools.storage.files import quoted
from loratools.tensors.lazy import from_torch
from loratools.updates.lora import LoRA

_Number = TypeVar("_Number", int, float)


def at_scale(name: str, update: LoRA, scale: float, dtype: str | None = None) -> LoRA:
    """The update with `alpha = scale * rank`, plain: what its own scale differs by is folded into B.

    dtype: of the result's B where it changes; its own if None.
    """
    present_scale = update.scale
    if present_scale == scale:
        return replace(update, alpha=scale * update.rank, rslora=False)
    if scale == 0 or not math.isfinite(present_scale):
        raise UnsupportedError(f"{quoted(name)} has a scale of {present_scale}, which cannot be written as {scale}")
    b = update.b.read().double() * (present_scale / scale)
    stored = narrowed(f"{name}: B with the scale in it", b, dtype or update.b.dtype)
    return replace(update, b=from_torch(stored), alpha=scale * update.rank, rslora=False)


def at_rank(update: LoRA, rank: int) -> LoRA:
    """The update with zeros added to A and B up to `rank`, and the same scale."""
    import torch

    more = rank - update.rank
    if more == 0:
        return update
    a, b = update.a.read(), update.b.read()
    a = torch.cat([a, a.new_zeros(more, *a.shape[1:])])
    b = torch.cat([b, b.new_zeros(b.shape[0], more, *b.shape[2:])], dim=1)
    return replace(update, a=from_torch(a), b=from_torch(b), alpha=update.scale * rank, rslora=False)


def uniform(updates: Mapping[str, LoRA], dtype: str | None = None) -> tuple[dict[str, LoRA], int, float]:
    """All at the largest rank, and at the most common scale: for what has one rank and one scale for all.

    Returns:
        The updates, that rank, and that scale.
    """
    rank = max(u.rank for u in updates.values())
    scale = most_common(u.scale for u in updates.values())
    return {n: at_rank(at_scale(n, u, scale, dtype), rank) for n, u in updates.items()}, rank, scale


def most_common(values: Iterable[_Number], default: _Number | None = None) -> _Number:
    """The most common value, and the smallest of several equally common ones; `default` if there are no values."""
    counts = Counter(values)
    if not counts and default is not None:
        return default
    return min(counts, key=lambda v: (-counts[v], v))
