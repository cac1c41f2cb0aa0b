"""Names of tensors have PEFT's prefix twice.

A model with an adapter was wrapped in another before it was saved. Programs that take the prefix off once find no
module of these names, and some load nothing without a word.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.names import counted_names
from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject
from loratools.formats.peft_parts.keys import PREFIX

SEVERITY = "warning"
NEEDS = "headers"
FIX = "write the names anew: loratools convert ADAPTER -o OUT --to peft"


def observe(subject: Subject) -> Iterator[Observation]:
    """The keys that begin so."""
    if subject.source is None:
        return
    keys = tuple(key for key in subject.source.tensors if key.startswith(PREFIX * 2))
    if keys:
        yield Observation(f"the prefix '{PREFIX}' stands twice in {counted_names(keys, 'name')}", keys)
