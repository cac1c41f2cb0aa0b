"""Factors of all experts of a mixture in one tensor, and one by one: views when read, zeros for those left alone."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.tensors.dtypes import torch_dtype
from loratools.tensors.lazy import LazyTensor, from_torch
from loratools.tensors.views import reshaped, rows


def items(stack: LazyTensor) -> list[LazyTensor]:
    """Views of every expert's matrix in (experts, rows, columns)."""
    return [reshaped(rows(stack, e, e + 1), stack.shape[1:]) for e in range(stack.shape[0])]


def stacked(members: Mapping[int, LazyTensor], count: int) -> LazyTensor:
    """Stack the matrices of some experts, (count, rows, columns), with zeros for the others."""
    import torch

    first = next(iter(members.values()))
    zeros = torch.zeros(first.shape, dtype=torch_dtype(first.dtype))
    return from_torch(torch.stack([members[e].read() if e in members else zeros for e in range(count)]))
