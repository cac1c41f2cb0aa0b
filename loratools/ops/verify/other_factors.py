"""What a merge would store if factors of LoRA had been put together otherwise: added, or with other orders of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.naming.heads import interleaving, inverse
from loratools.ops.merge.outputs import Output, WeightedUpdate
from loratools.tensors.dtypes import torch_dtype
from loratools.tensors.lazy import from_torch
from loratools.updates.lora import LoRA

if TYPE_CHECKING:
    from torch import Tensor

# Sizes of heads that models have: even divisors of the rows, from the smallest toy models to the largest heads.
_HEAD_SIZES = range(2, 513, 2)


def factors_added(output: Output) -> Iterator[tuple[str, Output]]:
    """The output with one LoRA, whose A is a sum of all A and whose B a sum of all B, with the way of adding them.

    None where there is one adapter, or another kind, or ranks or places differ.
    """
    plain = _plain_loras(output)
    if plain is None or len({lora.a.shape for lora in plain}) > 1:
        return
    weights = [update.weight for update in output.updates]
    roots = [_signed_root(lora.scale * weight) for lora, weight in zip(plain, weights, strict=True)]
    if all(root > 0 for root in roots):
        yield (
            "each times the root of its scale and weight, as add_weighted_adapter of PEFT does with 'linear'",
            _with_sums(output, plain, roots, 1.0),
        )
    if len({lora.scale for lora in plain}) == 1:
        yield "each times its weight", _with_sums(output, plain, weights, plain[0].scale)


def _signed_root(value: float) -> float:
    return math.copysign(math.sqrt(abs(value)), value)


def _with_sums(output: Output, loras: list[LoRA], shares: list[float], scale: float) -> Output:
    """The output with the product of both sums, times `scale`."""

    def total(tensors: list[Tensor]) -> Tensor:
        return sum((share * tensor for share, tensor in zip(shares, tensors, strict=True)), 0 * tensors[0])

    added = replace(
        loras[0],
        a=from_torch(total([lora.a.read().double() for lora in loras])),
        b=from_torch(total([lora.b.read().double() for lora in loras])),
        alpha=scale * loras[0].rank,
        rslora=False,
    )
    first = output.updates[0]
    return replace(output, updates=(WeightedUpdate(first.adapter, added, 1.0, first.place),))


def joined_in(output: Output, dtype: str) -> Output | None:
    """The output with one LoRA, whose factors are those of all adapters side by side, rounded to `dtype`.

    A is multiplied with scale and weight in float32 before it is rounded, as add_weighted_adapter of PEFT does with
    'cat'. None where there is one adapter, or another kind, or places differ.
    """
    import torch

    loras = _plain_loras(output)
    if loras is None:
        return None
    stored = torch_dtype(dtype)
    weights = [update.weight for update in output.updates]
    scaled = [lora.a.read().float() * weight * lora.scale for lora, weight in zip(loras, weights, strict=True)]
    a = torch.cat(scaled).to(stored)
    b = torch.cat([lora.b.read().float() for lora in loras], dim=1).to(stored)
    joined = replace(loras[0], a=from_torch(a), b=from_torch(b), alpha=float(a.shape[0]), rslora=False)
    first = output.updates[0]
    return replace(output, updates=(WeightedUpdate(first.adapter, joined, 1.0, first.place),))


def _plain_loras(output: Output) -> list[LoRA] | None:
    """The LoRAs of several adapters for all of one weight; None if there is one, or another kind among them."""
    first = output.updates[0]
    loras = [update.update.as_lora() for update in output.updates]
    plain = [lora for lora in loras if lora is not None and lora.magnitude is None and lora.mid is None]
    if len(plain) < 2 or len(plain) != len(loras) or any(u.place != first.place for u in output.updates):
        return None
    return None if any(lora.embedding or len(lora.a.shape) != 2 for lora in plain) else plain


def rows_reordered(output: Output) -> Iterator[tuple[str, Output]]:
    """The output with the rows of its delta in another order of attention heads, with what that order is.

    None where the delta is no single LoRA of a whole weight.
    """
    only = output.updates[0]
    lora = only.update.as_lora()
    if len(output.updates) > 1 or lora is None or lora.embedding or lora.magnitude is not None or lora.mid is not None:
        return
    if only.place.order is not None:
        in_given_order = replace(only, place=replace(only.place, order=None))
        yield "that of the adapter, and not that of the base", replace(output, updates=(in_given_order,))
        return
    rows = lora.b.shape[0]
    if not only.place.is_whole or only.place.transposed:
        return
    b = lora.b.read()
    for size in _HEAD_SIZES:
        if rows % size:
            continue
        order = interleaving(rows, rows // size)
        for way, positions in (
            ("the halves of a head in turn, where the base has one after the other", order),
            ("one half of a head after the other, where the base has them in turn", inverse(order)),
        ):
            if list(positions) != list(range(rows)):
                reordered = replace(lora, b=from_torch(b[list(positions)].contiguous()))
                yield f"{way} (heads of {size} rows)", replace(output, updates=(replace(only, update=reordered),))
