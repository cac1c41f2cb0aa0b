"""What explains a weight of a merged model that is not as it should be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """What explains a weight that is not as it should be.

    Attributes:
        code: The name of the defect.
        message: In words, with the numbers that are the same for all weights with this cause.
        undecided: Whether it may just as well be a right merge.
    """

    code: str
    message: str
    undecided: bool = False
