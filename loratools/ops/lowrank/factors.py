"""An update as a product of factors, and a product as a LoRA of the same layer.

Updates that depend on the weights of the base have no product of their own, and are refused by name. A full difference
does have one: itself times the identity, exactly; its rank is then the smaller of its sizes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.errors import InputError, UnsupportedError
from loratools.ops.common.finite import DIVERGED, are_finite, is_finite, not_finite
from loratools.storage.files import quoted
from loratools.tensors.lazy import from_torch
from loratools.updates.lora import LoRA
from loratools.updates.parts.dense import unread_base
from loratools.updates.parts.protocol import Shape, Update

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.algebra.lowrank import Factors

# Products of factors beyond this are no update of a weight: float32 ends there.
_LARGEST = 3e38


@dataclass(frozen=True)
class Layout:
    """How a layer stores its weight: (out, in), (out, in, *kernel), or (tokens, width) of an embedding."""

    shape: Shape
    embedding: bool = False

    def lora(self, b: Tensor, a: Tensor) -> LoRA:
        """Return a LoRA of this layer at scale 1 with given factors.

        `b: (rows, rank)`, `a: (rank, columns)` of the weight as a matrix, as the update of this layer at scale 1.
        """
        rank = a.shape[0]
        if self.embedding:
            a, b = b.mT, a.mT
        elif len(self.shape) > 2:
            a = a.reshape(rank, *[size or 1 for size in self.shape[1:]])
            b = b.reshape(*b.shape, *[1] * (len(self.shape) - 2))
        return LoRA(
            from_torch(a.contiguous()), from_torch(b.contiguous()), float(rank), "config", embedding=self.embedding
        )


def layout_of(update: Update) -> Layout:
    return Layout(update.shape, update.as_lora() is not None and update.embedding)


def is_vector(update: Update) -> bool:
    """Whether it changes a bias, a norm, or a table such as the modulation of Wan, (1, 6, width), which has no rank."""
    shape = update.shape
    return len(shape) < 2 or (len(shape) > 2 and shape[0] == 1 and update.as_full() is not None)


def exact_factors(update: Update, name: str, whose: str) -> Factors:
    """Factors of the update in float64, scale included; of a vector its values, as one column.

    Raises:
        UnsupportedError: It depends on the weights of its base, or its tensors do not tell a matrix.
        InputError: Values that are not finite, named.
    """
    factors = update.factors()
    if factors is None:
        factors = _all_factors(update, name, whose)
    if not (are_finite(factors.b) and are_finite(factors.a)):
        parts = [f"{name}.{part}" for part, tensor in update.parts.items() if not is_finite(tensor)]
        raise not_finite(quoted(whose), parts or [f"{name}: scale {update.scale}"], DIVERGED)
    largest = float(factors.b.abs().amax() * factors.a.abs().amax()) if factors.a.numel() and factors.b.numel() else 0.0
    if not largest < _LARGEST:
        raise InputError(
            f"'{name}' of '{whose}' would reach {largest:.4g}, which no trained weight does",
            hint="look at the adapter's alpha",
        )
    return factors


def reason_against(update: Update) -> str | None:
    """Why an update has no factors, in a few words; None if it has, or where it can be turned into some."""
    if update.needs_base:
        if update.as_lora() is not None:
            return "DoRA: its delta depends on the weights of the base"
        return f"{update.kind}: its delta depends on the weights of the base"
    if None in update.shape:
        return f"{update.kind}: its tensors do not tell the shape of its weight"
    return None


def require_factors(updates: Iterable[tuple[str, Update]]) -> None:
    """Raise UnsupportedError with one line for each update that has no factors, if there is any.

    Args:
        updates: Pairs of what the error calls the update, and the update.
    """
    listed = list(updates)
    reasons = [f"{label}   {why}" for label, update in listed if (why := reason_against(update)) is not None]
    if reasons:
        raise UnsupportedError(
            f"{len(reasons)} of {len(listed)} updates have no delta of their own to compute with",
            details=reasons,
            hint="leave them out with --exclude; or merge the adapter into its base and extract a LoRA from the result",
        )


def _all_factors(update: Update, name: str, whose: str) -> Factors:
    import torch

    from loratools.algebra.lowrank import Factors

    if (why := reason_against(update)) is not None:
        raise UnsupportedError(
            f"'{name}' of '{whose}' has no delta of its own to compute with ({why})",
            hint="leave it out with --exclude; or merge the adapter into its base and extract a LoRA from the result",
        )
    delta = update.prepare(unread_base(update), weight=1.0, dtype="F64")
    rows, columns = delta.shape
    values = torch.from_numpy(delta.rows(0, rows)).double().reshape(rows, columns)
    if columns <= rows:
        return Factors(values, torch.eye(columns, dtype=torch.float64))
    return Factors(torch.eye(rows, dtype=torch.float64), values)
