"""The values of a source as numbers that rules look at. Each tensor is read in blocks, and none is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.adapter import Adapter
from loratools.checks.common.measured import MeasuredModule
from loratools.checks.common.subject import Subject
from loratools.errors import LoraToolsError
from loratools.ops.common.unreadable import as_ours
from loratools.ops.inspect.values import non_finite_count
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_BYTES = 16 << 20
# With a subnormal of these dtypes a device may compute as with 0. 8-bit numbers have few others.
_MEASURED = frozenset({"F64", "F32", "F16", "BF16"})


def with_values(subject: Subject) -> Subject:
    """The subject with what its values say; with the reason, where they cannot be read."""
    try:
        if subject.adapter is not None:
            return replace(
                subject,
                modules={name: _measured(update) for name, update in subject.adapter.updates.items()},
                tensors=_of_replacements(subject.adapter),
            )
        if subject.checkpoint is not None:
            weights = subject.checkpoint.weights.items()
            return replace(subject, tensors={name: _not_finite(tensor) for name, tensor in weights})
    except (LoraToolsError, OSError) as error:
        return replace(subject, error=as_ours(error))
    return subject


def _of_replacements(adapter: Adapter) -> dict[str, int]:
    return {name: _not_finite(replacement.tensor) for name, replacement in adapter.replacements.items()}


def _not_finite(tensor: LazyTensor) -> int:
    return non_finite_count(tensor, lambda nbytes: None) or 0


def _measured(update: Update) -> MeasuredModule:
    from loratools.algebra.lowrank import singular_values
    from loratools.ops.spectrum.modules import numerical_rank_of_update

    non_finite = subnormal = nonzero = 0
    for tensor in dict.fromkeys(update.parts.values()):
        if tensor.dtype not in _MEASURED:
            non_finite += _not_finite(tensor)
            continue
        for block in _blocks(tensor):
            finite = int(block.isfinite().sum())
            non_finite += block.numel() - finite
            nonzero += int(block.count_nonzero())
            subnormal += _subnormal_count(block)
    share = subnormal / nonzero if nonzero else 0.0
    size = math.prod(size for size in update.shape if size is not None)
    measured = MeasuredModule(non_finite=non_finite, subnormal_share=share, rank=update.rank, size=size)
    # A decomposition has no answer for what is not finite; of some kinds there are no factors without the base.
    if non_finite or (factors := update.factors()) is None:
        return measured
    values = singular_values(factors)
    return measured._replace(
        numerical_rank=numerical_rank_of_update(update, factors, values),
        norm=float(values.norm()),
        rows=factors.b.shape[0],
        zero_rows=int((~factors.b.any(dim=1)).sum()),
    )


def _subnormal_count(block: Tensor) -> int:
    import torch

    # Compared in the dtype itself: on the way to another one, subnormals may become 0.
    magnitude = block.abs()
    return int(((magnitude > 0) & (magnitude < torch.finfo(block.dtype).tiny)).sum())


def _blocks(tensor: LazyTensor) -> Iterator[Tensor]:
    if not tensor.shape:
        yield tensor.read()
        return
    count = max(1, -(-tensor.nbytes // _BLOCK_BYTES))
    rows = max(1, -(-tensor.shape[0] // count))
    for start in range(0, tensor.shape[0], rows):
        yield tensor.read_rows(start, min(start + rows, tensor.shape[0]))
