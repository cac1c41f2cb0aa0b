"""The rank is above the server's default limit.

The server refuses the adapter at the first request for it, until it is started with a larger limit.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.servers import SERVERS
from loratools.checks.common.subject import Subject

SEVERITY = "warning"
NEEDS = "program"
FIX = "start the server with a larger limit, or resize the adapter"


def observe(subject: Subject) -> Iterator[Observation]:
    """The largest rank, beside the server's limit."""
    if subject.program not in SERVERS or subject.adapter is None:
        return
    limits = SERVERS[subject.program]
    ranks = {name: update.rank for name, update in subject.adapter.updates.items() if update.rank is not None}
    over = tuple(name for name, rank in ranks.items() if limits.usual is not None and rank > limits.usual)
    if over:
        largest = max(ranks.values())
        yield Observation(
            f"the rank is {largest}, and {subject.program} takes {limits.usual} at most unless it is told",
            over,
            f"start the server with {limits.option} {largest}, or resize the adapter",
        )
