"""Whether adapters count the layers of their base alike, so that layer N of one is layer N of the others."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.adapter import Adapter
from loratools.errors import MismatchError


def require_same_layers(adapters: Sequence[Adapter], *, hint: str) -> None:
    """Raise MismatchError where the adapters repeat the layers of their base (`layer_replication`) in different ways.

    Args:
        adapters: Those that are taken together.
        hint: What the verb can do instead.
    """
    if len({adapter.layer_replication for adapter in adapters}) > 1:
        raise MismatchError(
            "the adapters repeat the layers of their base in different ways, so that their layers are not the same",
            details=[
                f"'{adapter.name}'   {[list(r) for r in adapter.layer_replication] or 'as they are'}"
                for adapter in adapters
            ],
            hint=hint,
        )
