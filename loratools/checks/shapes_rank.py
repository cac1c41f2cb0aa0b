"""The two factors of a module have different ranks.

Their product does not exist, so that no program can apply them: one of them is of another training, or was cut.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.names import counted_names
from loratools.checks.common.observation import Observation
from loratools.checks.common.pairs import factor_pairs
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "headers"
FIX = "save the adapter again; both factors must be of one training"


def observe(subject: Subject) -> Iterator[Observation]:
    """Pairs whose inner sizes differ, where nothing that is read explains it."""
    # What a format has read makes a product: stacks of experts, transposed factors.
    if subject.source is None or subject.adapter is not None:
        return
    differing = tuple(
        f"{module}: {list(a.shape)} and {list(b.shape)}"
        for module, parts in factor_pairs(subject.source.tensors).items()
        if len(parts) == 2
        and len((a := parts["A"][1]).shape) == len((b := parts["B"][1]).shape) == 2
        and a.shape[0] != b.shape[1]
        # MLX and others store factors transposed, under names in small letters.
        and not (".lora_a" in parts["A"][0] and a.shape[1] == b.shape[0])
    )
    if differing:
        yield Observation(f"the factors of {counted_names(differing, 'module')} make no product", differing)
