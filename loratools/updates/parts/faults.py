"""One wording for stored parts that cannot be what their kind needs."""

from __future__ import annotations

from loratools.errors import FormatError


def faulty(module: str, fault: str) -> FormatError:
    """Return the error of a module whose tensors do not make an update.

    `fault` begins with a verb: has no ...
    """
    return FormatError(f"'{module}' {fault}", hint="save the adapter again, or download it again if it was cut off")
