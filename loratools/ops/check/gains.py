"""What rounding to the dtype of the base would leave of each update, from some rows of each weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.checks.common.subject import Subject
from loratools.errors import LoraToolsError
from loratools.ops.common.unreadable import as_ours
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from loratools.checkpoints import Checkpoint

# Rows of each weight, in blocks over all of it: a sample of millions of entries tells a share to three digits.
_BLOCKS = 4
_ROWS = 16
_ROUNDED = frozenset({"F16", "BF16", "F32"})


def with_gains(subject: Subject, base: Checkpoint) -> Subject:
    """The subject with the gain of each module that goes into one whole weight as it is stored.

    The gain is `<merged - base, dW> / <dW, dW>`, merged by rounding to nearest. Fused, split and quantised weights are
    left out: a merge measures those.
    """
    fit, adapter = subject.fit, subject.adapter
    if adapter is None or fit is None or isinstance(fit, LoraToolsError):
        return subject
    quantised = base.quantisation.weights if base.quantisation is not None else {}
    gains: dict[str, float] = {}
    try:
        for name, places in fit.updates.items():
            if (
                len(places) == 1
                and places[0].is_whole
                and not places[0].transposed
                and places[0].weight not in quantised
            ):
                weight = base.weights.get(places[0].weight)
                gain = None if weight is None else _gain(adapter.updates[name], weight)
                if gain is not None:
                    gains[name] = gain
    except (LoraToolsError, OSError) as error:
        return replace(subject, error=subject.error or as_ours(error))
    return replace(subject, gains=gains)


def _gain(update: Update, weight: LazyTensor) -> float | None:
    """The gain of one update; None where it has no factors without its base, or changes nothing."""
    import torch

    if weight.dtype not in _ROUNDED or len(weight.shape) != 2 or update.needs_base:
        return None
    factors = update.factors()
    if factors is None or (factors.out_features, factors.in_features) != tuple(weight.shape):
        return None
    surviving = total = 0.0
    for start, stop in _row_blocks(weight.shape[0]):
        stored = weight.read_rows(start, stop)
        delta = factors.b[start:stop].double() @ factors.a.double()
        merged = (stored.double() + delta).to(stored.dtype)
        surviving += float(torch.sum((merged.double() - stored.double()) * delta))
        total += float(torch.sum(delta * delta))
    return surviving / total if total > 0 else None


def _row_blocks(rows: int) -> Iterator[tuple[int, int]]:
    if rows <= _BLOCKS * _ROWS:
        yield 0, rows
        return
    for block in range(_BLOCKS):
        start = block * (rows - _ROWS) // (_BLOCKS - 1)
        yield start, start + _ROWS
