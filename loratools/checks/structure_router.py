"""The adapter changes routers of a mixture of experts.

A router decides which experts see a token, so that a small change of it can change everything. Most servers do not load
updates of routers.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.names import counted_names
from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject

SEVERITY = "note"
NEEDS = "headers"
FIX = "make sure that the routers were meant to be trained"

# What models call them: `mlp.gate`, `block_sparse_moe.gate`, `mlp.router`, `mlp.shared_expert_gate`.
_ROUTERS = frozenset({"gate", "router", "gating", "shared_expert_gate", "wg"})


def observe(subject: Subject) -> Iterator[Observation]:
    """Updates and replaced weights of such modules."""
    if subject.adapter is None:
        return
    modules = [*subject.adapter.updates, *(name.rpartition(".")[0] for name in subject.adapter.replacements)]
    names = tuple(name for name in modules if not _ROUTERS.isdisjoint(name.split(".")[-2:]))
    if names:
        yield Observation(f"the adapter changes {counted_names(names, 'router')}", names)
