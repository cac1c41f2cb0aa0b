"""How the hub names models."""

from __future__ import annotations

import re

# `owner/name`. Anything else may be a folder of somebody's machine, which says nothing of the model in it.
_HUB_NAME = re.compile(r"(?!\.)[\w.-]+/[\w.-]+", re.ASCII)


def is_hub_name(name: str | None) -> bool:
    """Whether the name is one that the hub may have, and no path of somebody's machine."""
    return name is not None and _HUB_NAME.fullmatch(name) is not None
