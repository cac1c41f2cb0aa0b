"""One adapter as a row: the facts of an inspection that fit into a line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

from loratools.errors import LoraToolsError
from loratools.ops.common.unreadable import as_ours
from loratools.ops.inspect.entries import AdapterEntry
from loratools.ops.listing.rows import ListedAdapter
from loratools.sources.cache import cached_repository

_Value = TypeVar("_Value")


def row_of_adapter(entry: AdapterEntry, modified: str | None) -> ListedAdapter:
    """The row of an adapter that was inspected."""
    ranks = Counter(module.rank for module in entry.modules if module.rank is not None)
    largest = max(ranks, default=None)
    of_largest = [module for module in entry.modules if module.rank == largest]
    described = entry.description
    return ListedAdapter(
        path=entry.path,
        revision=revision_of(entry.path),
        format=entry.format,
        kind=" + ".join(sorted({module.kind for module in entry.modules})) or "replaced weights",
        family=entry.family,
        base_model=entry.base_model,
        modules=len(entry.modules),
        rank=largest,
        ranks=tuple(ranks.most_common()),
        alpha=_commonest(m.alpha for m in of_largest if m.alpha is not None),
        scale=_commonest(m.scale for m in of_largest),
        dtype=max(entry.dtypes, key=lambda dtype: entry.dtypes[dtype], default=None),
        parameters=entry.parameters,
        bytes=entry.bytes,
        title=described.title if described is not None else None,
        trigger_words=described.trigger_words if described is not None else (),
        date=described.date if described is not None else None,
        modified=modified,
        warnings=entry.warnings,
    )


def row_of_error(path: str, error: LoraToolsError | OSError, modified: str | None) -> ListedAdapter:
    """The row of something that cannot be read."""
    return ListedAdapter(path=path, revision=revision_of(path), modified=modified, error=as_ours(error).message)


def revision_of(path: str) -> str | None:
    """The commit that something is of in the hub's cache; None elsewhere."""
    if "models--" not in path:
        return None
    cached = cached_repository(Path(path))
    return None if cached is None else cached.commit


def modified_at(path: Path) -> str | None:
    """When a file, or the newest file in a folder, was last changed; None if that cannot be known."""
    try:
        files = [p for p in path.iterdir() if p.is_file()] if path.is_dir() else [path]
        newest = max((file.stat().st_mtime for file in files), default=path.stat().st_mtime)
        return datetime.fromtimestamp(newest, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OSError, ValueError, OverflowError):
        return None


def _commonest(values: Iterable[_Value]) -> _Value | None:
    counts = Counter(values)
    return counts.most_common(1)[0][0] if counts else None
