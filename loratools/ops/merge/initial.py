"""Adapters whose initialisation changed the base: what they began as is subtracted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratools.adapter import Adapter
from loratools.errors import MismatchError, UsageError
from loratools.ops.common.arguments import AdapterSource, RankFrom, Reading, load_adapter
from loratools.updates.lora_experts import Packing


def with_initial(
    adapters: Sequence[tuple[Adapter, float]],
    initial: Sequence[AdapterSource],
    *,
    rank_from: RankFrom,
    expert_packing: Packing | None = None,
) -> list[tuple[Adapter, float]]:
    """Each adapter whose initialisation changed the base, followed by the one it began as, with the opposite weight.

    The base was W - s B0 A0, and is W + (s B A - s B0 A0) after training.

    Raises:
        UsageError: There are not as many initial adapters as adapters that need one.
        MismatchError: One has other modules, or another scale, than the adapter that it became.
    """
    needing = [adapter for adapter, _ in adapters if adapter.initialisation_changed_base is not None]
    if len(initial) < len(needing):
        load_adapter(needing[len(initial)], Reading(moved=False))  # says what is needed, and why
    if len(initial) > len(needing):
        raise UsageError(
            f"{len(initial)} initial adapters are given, and {len(needing)} adapters need one",
            hint="only an initialisation that changes the base (PiSSA, OLoRA, CorDA, LoRA-GA) has to be subtracted",
        )
    remaining = iter(initial)
    weighted: list[tuple[Adapter, float]] = []
    for adapter, weight in adapters:
        weighted.append((adapter, weight))
        if adapter.initialisation_changed_base is None:
            continue
        reading = Reading(rank_from=rank_from, moved=True, expert_packing=_packing(adapter, expert_packing))
        began = load_adapter(next(remaining), reading)
        initial_modules = {name: (u.shape, u.scale) for name, u in began.updates.items()}
        trained_modules = {name: (u.shape, u.scale) for name, u in adapter.updates.items()}
        if initial_modules != trained_modules:
            differ = sorted(
                name
                for name in trained_modules.keys() | initial_modules.keys()
                if trained_modules.get(name) != initial_modules.get(name)
            )
            raise MismatchError(
                f"'{began.name}' is not the adapter that '{adapter.name}' was before training", details=differ[:20]
            )
        weighted.append((replace(began, replacements={}), -weight))
    return weighted


def _packing(adapter: Adapter, packing: Packing | None) -> Packing | None:
    """What is said of the experts of the adapter holds of what it began as."""
    return packing if any(update.as_experts() is not None for update in adapter.updates.values()) else None
