"""Projections that one model has fused and another apart: updates cut into pieces and put together, exactly.

apart    every piece shares A and gets its rows of B
fused    A of all below each other and B block-diagonal: the ranks add; or one A, where all have the same

Other kinds are cut and put together where their own file can do it exactly (`Update.cut_rows`, `Update.stack_rows`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratools.naming.image.family import Place, sizes
from loratools.storage.same import same_bytes
from loratools.tensors.files import ByteRange
from loratools.tensors.joined import block_diagonal, stacked
from loratools.tensors.lazy import LazyTensor, from_torch
from loratools.tensors.views import reordered, rows
from loratools.updates.full import Full
from loratools.updates.lora import LoRA
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from torch import Tensor


def apart(update: Update, place: Place, *, columns: int | None) -> dict[str, Update] | None:
    """The update of each module that `place` means; None if this one cannot be cut.

    columns: inputs of the module; also of the one that the update of a bias belongs to.
    """
    if len(place.targets) == 1 and not place.may_swap:
        return {place.targets[0]: update}
    rows = _rows_that_cut(update)
    if rows is None:
        return None
    if len(place.targets) == 1:
        swapped = _in_other_order(update, place, columns)
        return None if swapped is None else {place.targets[0]: swapped}
    if columns is None and place.split != "thirds":
        return None
    shares = sizes(place.split, rows, columns or 0, len(place.targets))
    if shares is None:
        return None
    pieces: dict[str, Update] = {}
    start = 0
    for target, share in zip(place.targets, shares, strict=True):
        piece = _rows(update, (start, start + share))
        if piece is None:
            return None
        pieces[target] = piece
        start += share
    return pieces


def why_not_fused(parts: Mapping[str, Mapping[str, Update]], place: Place) -> str | None:
    """Why the updates of weights and biases of these parts cannot become one; None if they can."""
    weights = [updates["weight"] for updates in parts.values() if "weight" in updates]
    loras = [lora for u in weights if (lora := u.as_lora()) is not None]
    biases = [updates["bias"] for updates in parts.values() if "bias" in updates]
    if biases and len(biases) < len(place.targets):
        return "a bias of some parts of a fused module only"
    if len(loras) < len(parts):
        return _why_not_stacked(weights, len(parts), place)
    if any(u.mid is not None or len(u.a.shape) > 2 for u in loras):
        return "convolutions are not fused"
    if len({u.shape[1] for u in loras}) > 1:
        return "parts of a fused module with different inputs"
    dora = [u for u in loras if u.magnitude is not None]
    if dora and (len(dora) < len(place.targets) or any(u.magnitude_of == "in" for u in dora)):
        return "a magnitude (DoRA) of inputs, or of some parts only, has no place in a fused module"
    return None


def _why_not_stacked(weights: Sequence[Update], count: int, place: Place) -> str | None:
    """Why these parts, not all of them LoRA, cannot become one update of their own kind; None if they can."""
    kinds = sorted({u.kind for u in weights})
    if len(kinds) > 1 or len(weights) < count:
        return "parts of a fused module of several kinds"
    if count < len(place.targets):
        return f"{kinds[0]} of some parts of a fused module only; 'loratools resize' makes LoRA of it"
    if weights[0].stack_rows(weights[1:]) is None:
        return f"{kinds[0]} of the parts of a fused module, which has no exact one; 'loratools resize' makes LoRA of it"
    return None


def fused_bias(parts: Sequence[Full]) -> Full:
    """One bias, from those of the parts in their order."""
    return Full(stacked([part.diff for part in parts]))


def stacked_updates(members: Mapping[str, Update], place: Place) -> Update:
    """One update of the parts of a fused module, which are of another kind than LoRA and all there."""
    first, *others = (members[target] for target in place.targets)
    one = first.stack_rows(others)
    assert one is not None, "refused before"
    return one


def fused(members: Mapping[str, LoRA], place: Place, missing: Sequence[int | None]) -> LoRA:
    """One LoRA of the module that `place` names, from those of its parts, which `why_not_fused` has nothing against.

    missing: outputs of the parts that are not in `members`, in their places; None for those that are there.
    """
    present = [members[t] for t in place.targets if t in members]
    magnitudes = [u.magnitude for u in present if u.magnitude is not None]
    magnitude = stacked(magnitudes) if magnitudes else None
    first = present[0]
    alike = all(
        u.scale == first.scale and u.rank == first.rank and (u.a == first.a or same_bytes(u.a, first.a))
        for u in present[1:]
    )
    if alike and len(present) == len(place.targets):
        b = stacked([u.b for u in present])
        return replace(first, b=b, magnitude=magnitude, magnitude_of="out")
    rank = sum(u.rank for u in present)
    scales = {u.scale for u in present}
    source = first.alpha_source
    blocks = [
        member.b if (member := members.get(target)) is not None else count or 0
        for target, count in zip(place.targets, missing, strict=True)
    ]
    b = block_diagonal(blocks, [u.scale for u in present] if len(scales) > 1 else None)
    alpha = float(rank) if len(scales) > 1 else scales.pop() * rank
    return LoRA(stacked([u.a for u in present]), b, alpha, source, magnitude=magnitude)


def swapped_back(update: Update, place: Place, *, columns: int | None) -> Update | None:
    """As the original has it, where its halves stand in another order; None if the kind has no halves."""
    return _in_other_order(update, place, columns)


def without_zeros(update: LoRA) -> LoRA:
    """Of a piece of what was fused: without the rows of A that only other pieces use. Reads B."""
    if not isinstance(update.b.source, _Piece):
        return update
    used = update.b.read().float().abs().sum(dim=0) != 0
    if bool(used.all()):
        return update
    a, b = update.a.read()[used].contiguous(), update.b.read()[:, used].contiguous()
    rank = int(used.sum())
    return replace(update, a=from_torch(a), b=from_torch(b), alpha=update.scale * rank, rslora=False)


def _rows_that_cut(update: Update) -> int | None:
    """How many outputs it has, if they can be taken apart."""
    if (lora := update.as_lora()) is not None and not (lora.magnitude is not None and lora.magnitude_of == "in"):
        return lora.shape[0]
    if (full := update.as_full()) is not None:
        return full.shape[0] if full.shape else None
    return update.shape[0] if update.shape and lora is None else None


def _rows(update: Update, span: tuple[int, int]) -> Update | None:
    if (full := update.as_full()) is not None:
        return replace(full, diff=rows(full.diff, *span))
    if (lora := update.as_lora()) is None:
        return update.cut_rows(*span)
    magnitude = None if lora.magnitude is None else rows(lora.magnitude, *span)
    b = rows(lora.b, *span)
    return replace(lora, b=LazyTensor(b.shape, b.dtype, _Piece(b)), magnitude=magnitude)


def _in_other_order(update: Update, place: Place, columns: int | None) -> Update | None:
    rows = _rows_that_cut(update)
    # A module with another number of outputs has no halves of this kind.
    if not (place.swap or place.gated) or (rows is not None and not place.halves_swapped(rows, columns or 0)):
        return update
    return None if rows is None else _with_halves_swapped(update)


def _with_halves_swapped(update: Update) -> Update | None:
    if (full := update.as_full()) is not None:
        return replace(full, diff=_halves(full.diff))
    if (lora := update.as_lora()) is None:
        return None
    magnitude = None if lora.magnitude is None else _halves(lora.magnitude)
    return replace(lora, b=_halves(lora.b), magnitude=magnitude)


def _halves(tensor: LazyTensor) -> LazyTensor:
    """The second half of the rows, then the first."""
    half = tensor.shape[0] // 2
    return reordered(tensor, (*range(half, 2 * half), *range(half)))


@dataclass(frozen=True)
class _Piece:
    """Rows of B that belong to one part of what is fused."""

    of: LazyTensor

    @property
    def location(self) -> ByteRange | None:
        return self.of.location

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.of.read_rows(start, stop)

    def scalar(self) -> float:
        return self.of.scalar()
