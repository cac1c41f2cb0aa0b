"""Rows of a LoRA update, and several as the rows of one: both exact.

Some rows of a product are those rows of B and all of A. Several products one below the other are their A's one below
the other and their B's along a diagonal, so that ranks add up; where all A's are equal it is that A, and their B's one
below the other. The magnitude of DoRA is a number for each output, and goes with its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratools.tensors.lazy import from_torch
from loratools.tensors.views import reordered, rows
from loratools.updates.lora import LoRA


def rows_of(update: LoRA, start: int, stop: int) -> LoRA:
    """Rows start:stop of the update, without the terms that are zero there; of rank 0 where all of it is.

    Reads B, to see which terms these are. With a magnitude all terms stay: rows of zeros are normalised too.
    """
    part = rows(update.b, start, stop)
    if update.magnitude is not None:
        return replace(update, b=part, magnitude=rows(update.magnitude, start, stop))
    values = part.read()
    used = (values != 0).any(dim=0)
    if bool(used.all()):
        return replace(update, b=part, alpha=update.scale * update.rank, rslora=False)
    rank = int(used.sum())
    return replace(
        update,
        a=from_torch(update.a.read()[used]),
        b=from_torch(values[:, used].contiguous()),
        alpha=update.scale * rank,
        rslora=False,
    )


def rows_in_turn(update: LoRA, first: int, step: int) -> LoRA:
    """Every `step`-th row of the update from `first` on, with all of its terms. It has no magnitude."""
    assert update.magnitude is None, "a magnitude goes with its row"
    return replace(update, b=reordered(update.b, tuple(range(first, update.b.shape[0], step))))


def stacked_rows(parts: Sequence[tuple[int, LoRA]], out: int) -> LoRA:
    """An update of `out` rows: each part from its row on, zeros elsewhere. All must have one scale.

    Raises:
        ValueError: Scales or inputs differ, rows overlap or lie outside, or some rows have a magnitude and some none.
    """
    import torch

    ordered = sorted(parts, key=lambda p: p[0])
    first = ordered[0][1]
    ends = [start + u.shape[0] for start, u in ordered]
    starts = [start for start, _ in ordered]
    if any(end > start for end, start in zip(ends, [*starts[1:], out], strict=True)):
        raise ValueError(f"rows from {starts} to {ends} do not fit {out}")
    if len({u.scale for _, u in ordered}) > 1 or len({u.shape[1] for _, u in ordered}) > 1:
        raise ValueError("parts of different scales or inputs")
    magnitudes = [u.magnitude.read().reshape(-1) for _, u in ordered if u.magnitude is not None]
    if magnitudes and sum(len(m) for m in magnitudes) != out:
        raise ValueError("rows without a magnitude")
    downs = [u.a.read() for _, u in ordered]
    ups = [u.b.read() for _, u in ordered]
    dtype = downs[0].dtype
    for values in (*downs, *ups):
        dtype = torch.promote_types(dtype, values.dtype)
    share_a = all(torch.equal(d, downs[0]) for d in downs) if len({d.shape for d in downs}) == 1 else False
    a = downs[0].to(dtype) if share_a else torch.cat([d.to(dtype) for d in downs])
    b = torch.zeros(out, a.shape[0], dtype=dtype)
    column = 0
    for start, up in zip(starts, ups, strict=True):
        b[start : start + up.shape[0], column : column + up.shape[1]] = up
        column += 0 if share_a else up.shape[1]
    magnitude = from_torch(torch.cat(magnitudes)) if magnitudes else None
    return replace(
        first, a=from_torch(a), b=from_torch(b), alpha=first.scale * a.shape[0], rslora=False, magnitude=magnitude
    )
