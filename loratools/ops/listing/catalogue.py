"""The catalogue: what was found at paths that were looked at before, kept in the user's cache folder.

An outcome is found again by the path and by the stamp of its files: their names, sizes, numbers and times of change.
Nothing is ever asked of the catalogue that the files do not say: it may be deleted at any time, and where it cannot be
read or written the list is made without it. Two runs at once may write into it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeAlias

from loratools._version import __version__
from loratools.ops.listing.rows import ListedAdapter, OtherSource

Outcome: TypeAlias = ListedAdapter | OtherSource

# Outcomes that were stored by another version, or with other fields, are not found.
_KIND = f"{__version__} {','.join(field.name for field in fields(ListedAdapter))}"
# How many paths are queried at once: SQLite allows at least this number of variables.
_AT_ONCE = 500
_SECONDS = 5.0


def default_path() -> Path:
    """Where the catalogue is, if nothing else is said: in the cache folder of the user."""
    from platformdirs import user_cache_path

    return user_cache_path("loratools", appauthor=False) / "adapters.sqlite"


def stamp(path: Path) -> str | None:
    """What changes whenever an adapter does: of its file, or of all files in its folder; None if nothing is there.

    Files of a folder below are no part of it.
    """
    try:
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        facts = [(file.name, file.stat()) for file in files]
    except OSError:
        return None
    return json.dumps([[name, s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns] for name, s in facts])


class Catalogue:
    """Outcomes by path.

    Args:
        path: The file of the catalogue; None for one that keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def known(self, stamps: Mapping[str, str]) -> dict[str, Outcome]:
        """The outcomes that are still true, by path.

        Args:
            stamps: The present stamp of each path.
        """
        shown = {str(Path(path).absolute()): path for path in stamps}
        paths = list(shown)
        outcomes: dict[str, Outcome] = {}
        with suppress(sqlite3.Error, OSError, ValueError, TypeError):
            if self._path is None or not self._path.exists():
                return {}
            with closing(self._connected(self._path)) as connection:
                for start in range(0, len(paths), _AT_ONCE):
                    batch = paths[start : start + _AT_ONCE]
                    marks = ",".join("?" * len(batch))
                    query = f"SELECT path, stamp, body FROM adapters WHERE kind = ? AND path IN ({marks})"
                    for path, stored_stamp, body in connection.execute(query, [_KIND, *batch]):
                        if stored_stamp == stamps[shown[path]]:
                            outcomes[shown[path]] = replace(_from_body(body), path=shown[path])
        return outcomes

    def keep(self, outcomes: Iterable[Outcome], stamps: Mapping[str, str]) -> None:
        """Write outcomes into the catalogue, in place of older ones of the same paths; but no failures."""
        entries = [
            (str(Path(each.path).absolute()), stamps[each.path], _KIND, _body(each))
            for each in outcomes
            if each.path in stamps and not (isinstance(each, ListedAdapter) and each.error is not None)
        ]
        if self._path is None or not entries:
            return
        with suppress(sqlite3.Error, OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connected(self._path)) as connection, connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS adapters (path TEXT PRIMARY KEY, stamp TEXT, kind TEXT, body TEXT)"
                )
                connection.executemany("INSERT OR REPLACE INTO adapters VALUES (?, ?, ?, ?)", entries)

    @staticmethod
    def _connected(path: Path) -> sqlite3.Connection:
        return sqlite3.connect(path, timeout=_SECONDS)


def _body(outcome: Outcome) -> str:
    return json.dumps([getattr(outcome, field.name) for field in fields(outcome)])


def _from_body(body: str) -> Outcome:
    stored = json.loads(body)
    if len(stored) == len(fields(OtherSource)):
        return OtherSource(*stored)
    row: dict[str, Any] = {}
    for field, value in zip(fields(ListedAdapter), stored, strict=True):
        row[field.name] = tuple(value) if isinstance(value, list) else value
    row["ranks"] = tuple((rank, count) for rank, count in row["ranks"])
    return ListedAdapter(**row)
