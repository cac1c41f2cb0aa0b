"""What only the person who trained an adapter knows: where it began, and how its experts are packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast, get_args

from loratools.adapter import Adapter
from loratools.errors import MismatchError, UsageError
from loratools.ops.common.arguments import AdapterSource, RankFrom, load_adapter
from loratools.updates.lora_experts import Orientation, Packing


def with_initial(
    adapters: Sequence[tuple[Adapter, float]], initial: Sequence[AdapterSource], *, rank_from: RankFrom
) -> list[tuple[Adapter, float]]:
    """Each adapter whose initialisation changed the base, followed by the one it began as, with the opposite weight.

    The base was W - s B0 A0, and is W + (s B A - s B0 A0) after training.

    Raises:
        UsageError: there are not as many initial adapters as adapters that need one.
        MismatchError: one has other modules, or another scale, than the adapter that it became.
    """
    needing = [adapter for adapter, _ in adapters if adapter.initialisation_changed_base is not None]
    if len(initial) < len(needing):
        load_adapter(needing[len(initial)], moved=False)  # says what is needed, and why
    if len(initial) > len(needing):
        raise UsageError(
            f"{len(initial)} initial adapters are given, and {len(needing)} adapters need one",
            hint="only an initialisation that changes the base (PiSSA, OLoRA, CorDA, LoRA-GA) has to be taken off",
        )
    rest = iter(initial)
    found: list[tuple[Adapter, float]] = []
    for adapter, weight in adapters:
        found.append((adapter, weight))
        if adapter.initialisation_changed_base is None:
            continue
        began = load_adapter(next(rest), rank_from=rank_from, moved=True)
        theirs = {name: (u.shape, u.scale) for name, u in began.updates.items()}
        mine = {name: (u.shape, u.scale) for name, u in adapter.updates.items()}
        if theirs != mine:
            differ = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
            raise MismatchError(f"'{began.name}' is not what '{adapter.name}' began as", details=differ[:20])
        found.append((replace(began, replacements={}), -weight))
    return found


def with_experts(adapter: Adapter, *, packing: str | None, orientation: str | None) -> Adapter:
    """The adapter with its fused experts taken as somebody says.

    Raises:
        UsageError: there is no such packing or orientation, or nothing that it would apply to.
    """
    if packing is None and orientation is None:
        return adapter
    if packing not in (None, *get_args(Packing)) or orientation not in (None, "out-in", "in-out"):
        raise UsageError("experts are packed as peft or expert-major, and stored as out-in or in-out")
    chosen: dict[str, object] = {}
    if packing is not None:
        chosen["packing"] = cast(Packing, packing)
    if orientation is not None:
        chosen["orientation"] = cast(Orientation, orientation)
    updates = {
        name: u if (experts := u.as_experts()) is None else replace(experts, **chosen)  # type: ignore[arg-type]
        for name, u in adapter.updates.items()
    }
    if not any(u.as_experts() is not None for u in updates.values()):
        raise UsageError(f"'{adapter.name}' has no fused experts")
    return replace(adapter, updates=updates)
