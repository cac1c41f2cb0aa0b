"""The result of a combination as an adapter, with what its sources agree on and the recipe that made it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from loratools._version import __version__
from loratools.adapter import Adapter, Replacement
from loratools.formats.common.notes import agreed_notes, lora_notes
from loratools.updates.parts.protocol import Update

_T = TypeVar("_T")


def combined_adapter(
    sources: Sequence[Adapter],
    updates: Mapping[str, Update],
    replacements: Mapping[str, Replacement],
    recipe: Mapping[str, object],
) -> Adapter:
    """The adapter of these updates, with those notes of the sources that still hold, and with its recipe."""
    notes = agreed_notes([lora_notes(source.notes, updates) for source in sources])
    text = json.dumps({"loratools": __version__, "verb": "combine", "recipe": recipe}, default=str)
    return replace(
        sources[0],
        updates=updates,
        replacements=replacements,
        path=None,
        base_model=next((source.base_model for source in sources if source.base_model is not None), None),
        fan_in_fan_out=_agreed(source.fan_in_fan_out for source in sources),
        layer_replication=_agreed(source.layer_replication for source in sources) or (),
        invocation_tokens=_agreed(source.invocation_tokens for source in sources) or (),
        base_class=_agreed(source.base_class for source in sources),
        task_type=_agreed(source.task_type for source in sources),
        notes={**notes, "loratools": {"metadata": {"loratools": text}}},
        warnings=(),
    )


def base_warnings(sources: Sequence[Adapter]) -> list[str]:
    """A warning where the adapters name different base models."""
    bases = {source.base_model for source in sources} - {None}
    if len(bases) < 2:
        return []
    return [f"the adapters name different base models: {', '.join(sorted(map(repr, bases)))}"]


def _agreed(values: Iterable[_T]) -> _T | None:
    """What all the sources say alike; None if they disagree."""
    first, *others = values
    return first if all(value == first for value in others) else None
