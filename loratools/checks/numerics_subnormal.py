"""Most values of a module are subnormal numbers of their dtype.

Below the smallest normal number a dtype has fewer and fewer digits, and devices that flush such numbers to 0 lose the
update altogether. In float16 this is everything below 0.00006.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject
from loratools.formats.common.source import counted

SEVERITY = "warning"
NEEDS = "values"
FIX = "save the adapter in bfloat16 or float32"


def observe(subject: Subject) -> Iterator[Observation]:
    """Modules of which more than half of the values that are not 0 are so small."""
    small = tuple(
        f"{name}: {module.subnormal_share:.0%} of its values"
        for name, module in (subject.modules or {}).items()
        if module.subnormal_share > 0.5
    )
    if small:
        yield Observation(f"most values are subnormal in {counted(len(small), 'module')}", small)
