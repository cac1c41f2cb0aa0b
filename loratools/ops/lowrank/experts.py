"""Fused experts taken apart into one LoRA for each, and put together again.

An expert is a target of its own while it is combined or resized: `mlp.experts[3]`. The parameter that holds all of
them has one rank, so that experts with less are filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratools.errors import MismatchError
from loratools.tensors.lazy import from_torch
from loratools.updates.lora import LoRA
from loratools.updates.lora_experts import LoRAExperts, Orientation
from loratools.updates.parts.protocol import Update


@dataclass(frozen=True)
class Experts:
    """What the updates of all adapters for the experts of one layer have in common."""

    count: int
    orientation: Orientation | None

    @classmethod
    def of(cls, update: LoRAExperts) -> Experts:
        return cls(update.experts, update.orientation)


def apart(updates: Mapping[str, Update]) -> tuple[dict[str, Update], dict[str, Experts]]:
    """The updates with those of fused experts as one for each, and what is needed to put those together."""
    updates_apart: dict[str, Update] = {}
    layers: dict[str, Experts] = {}
    for name, update in updates.items():
        if (experts := update.as_experts()) is not None:
            layers[name] = Experts.of(experts)
            updates_apart |= {expert_target(name, i): experts.expert(i) for i in range(experts.experts)}
        else:
            updates_apart[name] = update
    return updates_apart, layers


def ensure_alike(name: str, first: Experts, second: Experts) -> None:
    """Raise MismatchError where two adapters mean different things by the experts of a layer."""
    if first != second:
        raise MismatchError(
            f"the adapters differ in the experts of '{name}'",
            details=[
                f"{e.count} experts, stored {e.orientation or 'in a way that is not told'}" for e in (first, second)
            ],
            hint="they were trained on different models, or saved in different ways",
        )


def together(updates: Mapping[str, Update], layers: Mapping[str, Experts]) -> dict[str, Update]:
    """The updates with experts as one parameter again, each at scale 1."""
    joined = dict(updates)
    for name, experts in layers.items():
        parts = [joined.pop(expert_target(name, i), None) for i in range(experts.count)]
        loras = [lora for p in parts if p is not None and (lora := p.as_lora()) is not None]
        if len(loras) == experts.count:
            joined[name] = _joined(loras, experts)
    return joined


def zeros_like(update: Update) -> LoRA:
    """An update of rank 1 that changes nothing, for the same layer."""
    import torch

    lora = update.as_lora()
    assert lora is not None
    dtype = lora.a.read().dtype
    rows, columns = lora.shape[:2]
    return LoRA(
        from_torch(torch.zeros(1, columns, dtype=dtype)), from_torch(torch.zeros(rows, 1, dtype=dtype)), 1.0, "config"
    )


def _joined(parts: list[LoRA], experts: Experts) -> LoRAExperts:
    import torch

    rank = max(p.rank for p in parts)
    # One alpha is for all experts: where scales differ they go into B, which is then wide enough not to round them.
    scales = {p.scale for p in parts}
    common = scales.pop() if len(scales) == 1 else 1.0
    a, b = [], []
    for p in parts:
        a.append(torch.nn.functional.pad(p.a.read(), (0, 0, 0, rank - p.rank)))
        values = p.b.read()
        if p.scale != common:
            values = values.to(torch.promote_types(values.dtype, torch.float32)) * p.scale
        b.append(torch.nn.functional.pad(values, (0, rank - p.rank)))
    # An expert's columns lie apart: (out, rank, experts).
    columns = torch.stack(b, dim=2).flatten(1)
    return LoRAExperts(
        from_torch(torch.cat(a)),
        from_torch(columns.contiguous()),
        experts.count,
        common * rank,
        "config",
        orientation=experts.orientation,
    )


def expert_target(name: str, index: int) -> str:
    """What one expert of a fused parameter is called while it is a target of its own."""
    return f"{name}[{index}]"
