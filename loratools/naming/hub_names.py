"""How the hub names models, and where its cache keeps them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

# `owner/name`. Anything else may be a folder of somebody's machine, which says nothing of the model in it.
_HUB_NAME = re.compile(r"(?!\.)[\w.-]+/[\w.-]+", re.ASCII)
_CACHE_FOLDER = "models--"


def is_hub_name(name: str | None) -> bool:
    """Whether the name is one that the hub may have, and no path of somebody's machine."""
    return name is not None and _HUB_NAME.fullmatch(name) is not None


class CachedModel(NamedTuple):
    """A path in the cache of the hub: `models--OWNER--NAME/snapshots/REVISION/...`.

    Attributes:
        name: `owner/name`, as the hub calls it.
        revision: The commit; None for a path outside of snapshots.
        inside: The path within the snapshot, with slashes; empty for the snapshot itself.
    """

    name: str
    revision: str | None = None
    inside: str = ""


def cached_model(path: Path) -> CachedModel | None:
    """Return the repository and revision of a path in the cache of the hub; None for any other path.

    Example:
        >>> cached_model(Path("hub/models--meta--llama-9/snapshots/0f3a/checkpoint-10"))
        CachedModel(name='meta/llama-9', revision='0f3a', inside='checkpoint-10')
    """
    parts = path.absolute().parts
    at = max((i for i, part in enumerate(parts) if part.startswith(_CACHE_FOLDER)), default=None)
    if at is None:
        return None
    name = parts[at].removeprefix(_CACHE_FOLDER).replace("--", "/")
    if len(parts) < at + 3 or parts[at + 1] != "snapshots":
        return CachedModel(name)
    return CachedModel(name, parts[at + 2], "/".join(parts[at + 3 :]))
