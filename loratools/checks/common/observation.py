"""What a rule says of one subject: what it has seen, and what it could not look at."""

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


class Unobserved(NamedTuple):
    """Something that a rule could not look at, so that it says nothing of it.

    `why`: why not, as the end of a sentence that begins with "not checked, as". `names`: the modules that it is about;
    empty if it is about all of the subject.
    """

    why: str
    names: tuple[str, ...] = ()
