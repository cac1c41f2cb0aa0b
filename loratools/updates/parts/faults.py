"""One wording for stored parts that cannot be what their kind needs."""

from __future__ import annotations

from loratools.errors import FormatError


def faulty(module: str, fault: str) -> FormatError:
    """`what` begins with a verb: has no ..."""
    return FormatError(f"'{module}' {fault}", hint="save the adapter again, or download it again if it was cut off")
