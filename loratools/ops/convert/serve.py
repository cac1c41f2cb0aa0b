"""An adapter as inference servers load it: one rank, one plain alpha, no patterns, no rsLoRA, no whole weights."""

from __future__ import annotations

from dataclasses import replace

from loratools.adapter import Adapter
from loratools.checks.common.servers import server
from loratools.formats.common.notes import record_notes
from loratools.formats.common.scale import uniform
from loratools.formats.common.source import counted
from loratools.ops.lowrank.experts import apart, together


def served(adapter: Adapter, name: str, dtype: str | None) -> tuple[Adapter, list[str]]:
    """The adapter as the server loads it, with equal deltas, and what a person should know."""
    one_by_one, layers = apart({n: u for n, u in adapter.updates.items() if u.rank})
    updates = {n: lora for n, u in one_by_one.items() if (lora := u.as_lora()) is not None}
    if not updates:
        return adapter, []
    at_one_rank, rank, scale = uniform(updates, dtype)
    uniform_updates = together(at_one_rank, layers)
    warnings = []
    if padded := sum(u.rank != rank for u in updates.values()):
        warnings.append(f"{counted(padded, 'module')} filled up with zeros to rank {rank}: {name} has one for all")
    if folded := sum(u.scale != scale for u in updates.values()):
        warnings.append(f"the scale of {counted(folded, 'module')} is folded into B: {name} has one for all")
    server_limits = server(name)
    if server_limits.usual is not None and rank > server_limits.usual:
        warnings.append(f"{name} takes rank {server_limits.usual} by default: {server_limits.option} {rank}")
    # What a server would apply to the base besides factors, or refuse, stays out of the config. Modules are listed by
    # the last part of their names, which is what servers look at; a longer name is no error, and not understood.
    fields = {
        "target_modules": sorted({n.rpartition(".")[2] for n in uniform_updates if n not in layers}),
        "bias": "none",
    }
    notes = record_notes(adapter, uniform_updates, fields)
    return replace(adapter, updates=uniform_updates, fan_in_fan_out=None, layer_replication=(), notes=notes), warnings
