"""What a rule says of one subject."""

from __future__ import annotations

from typing import NamedTuple


class Observation(NamedTuple):
    """Something that a rule has seen.

    `message`: what it is, with the numbers that show it. `evidence`: the names that it is about, all of them. `fix`:
    what to do, where that is more than the rule itself says.
    """

    message: str
    evidence: tuple[str, ...] = ()
    fix: str | None = None
