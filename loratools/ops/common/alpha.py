"""The alpha that a person gives for an adapter whose files do not say it."""

from __future__ import annotations

import math
from dataclasses import replace

from loratools.adapter import Adapter
from loratools.errors import UsageError
from loratools.formats.common.source import counted, shown
from loratools.storage.files import quoted
from loratools.updates.parts.protocol import Update


def with_alpha(adapter: Adapter, alpha: float | None) -> Adapter:
    """The adapter with `alpha` where its files do not say one.

    Raises:
        UsageError: They all say it, or it is no scale.
    """
    if alpha is None:
        return adapter
    if not math.isfinite(alpha) or alpha == 0:
        raise UsageError(f"an alpha of {alpha:g} gives no scale")
    assumed = _assuming_alpha(adapter)
    if not assumed:
        raise UsageError(f"{quoted(adapter.name)} states its own alpha, so that --alpha does not apply")
    changed = {name: update.with_alpha(alpha) for name, update in assumed.items()}
    return replace(adapter, updates={**adapter.updates, **changed})


def assumed_alpha_warnings(adapter: Adapter) -> list[str]:
    """A warning where the scale of some modules rests on an alpha that nobody has said."""
    assumed = _assuming_alpha(adapter)
    if not assumed:
        return []
    alphas = sorted({update.alpha for update in assumed.values() if update.alpha is not None})
    return [
        f"the scale of {counted(len(assumed), 'module')} is not stored and is assumed to be that of alpha "
        f"{', '.join(shown([f'{alpha:g}' for alpha in alphas]))}: if it was trained with another, give it with --alpha"
    ]


def _assuming_alpha(adapter: Adapter) -> dict[str, Update]:
    """Updates scaled by an alpha that nobody has said. A whole difference has none; not every LoKr has a use of it."""
    return {name: update for name, update in adapter.updates.items() if update.assumes_alpha}
