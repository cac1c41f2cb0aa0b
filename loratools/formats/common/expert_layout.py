"""How the tensors of fused experts are laid out, where the files leave it open and a person says it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratools.adapter import Adapter
from loratools.errors import UsageError
from loratools.storage.files import quoted
from loratools.updates.lora_experts import Orientation, Packing
from loratools.updates.parts.protocol import Update


def with_expert_layout(
    adapters: Sequence[Adapter], *, packing: Packing | None = None, orientation: Orientation | None = None
) -> list[Adapter]:
    """The adapters with their fused experts laid out as a person says.

    Args:
        adapters: Those that one command works on.
        packing: How the experts of a parameter share the columns of B: of the adapters whose files leave it open, or,
            where all files tell, of all adapters with fused experts.
        orientation: How square experts are stored, by the same rule.

    Raises:
        UsageError: There is no such orientation, or no adapter has fused experts.
    """
    if packing is None and orientation is None:
        return list(adapters)
    if orientation not in (None, "out-in", "in-out"):
        raise UsageError(f"experts are stored as out-in or in-out, and not as {quoted(orientation)}")
    experts = [one for a in adapters for u in a.updates.values() if (one := u.as_experts()) is not None]
    if not experts:
        names = ", ".join(quoted(a.name) for a in adapters)
        raise UsageError(
            f"{names} has no fused experts" if len(adapters) == 1 else f"none of {names} has fused experts"
        )
    packing_open = any(one.packing is None for one in experts)
    orientation_open = any(one.orientation is None for one in experts)

    def laid_out(update: Update) -> Update:
        one = update.as_experts()
        if one is None:
            return update
        if packing is not None and (one.packing is None or not packing_open):
            one = replace(one, packing=packing)
        if orientation is not None and (one.orientation is None or not orientation_open):
            one = replace(one, orientation=orientation)
        return one

    return [replace(a, updates={name: laid_out(u) for name, u in a.updates.items()}) for a in adapters]
