"""What of an input is in no result, and why: nothing is left out without a word."""

from __future__ import annotations

from dataclasses import dataclass

EXCLUDED = "left out by --include or --exclude"


@dataclass(frozen=True)
class Skipped:
    """Something that is left out.

    Attributes:
        name: Its name; that of a folder ends with a slash.
        why: The reason.
        what: What it is: a tensor, module, weight (one that an adapter replaces), metadata entry, or file.
        norm: Of a tensor that changed, the Frobenius norm of the change, where it was measured.
        share: Of a tensor that changed, the share of `norm` squared in the sum over all changed tensors.
    """

    name: str
    why: str
    what: str = "tensor"
    norm: float | None = None
    share: float | None = None
