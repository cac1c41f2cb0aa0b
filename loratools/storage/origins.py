"""Where folders of this machine come from: the address by which people call what was fetched into one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Origin:
    """Where the content of a folder comes from.

    Attributes:
        repository: The id on the hub, `owner/name`.
        commit: The hash of the revision, in full.
    """

    repository: str
    commit: str

    @property
    def address(self) -> str:
        """The address of this very revision."""
        return f"hf://{self.repository}@{self.commit}"


_origins: dict[Path, Origin] = {}


def note_origin(folder: Path, origin: Origin) -> None:
    """Have `folder`, and all that is in it, called by its address from now on."""
    _origins[folder] = origin


def origin_of(path: Path) -> Origin | None:
    """Return where the file or folder was fetched from in this process; None if it was given as a path."""
    folder = _noted_folder(path)
    return _origins[folder] if folder is not None else None


def shown(path: str | Path) -> str:
    """Return what to call a file or folder: the address that it was fetched from, or its path."""
    place = Path(path) if _origins else None
    folder = _noted_folder(place) if place is not None else None
    if place is None or folder is None:
        return str(path)
    inside = place.relative_to(folder).as_posix()
    return _origins[folder].address + ("" if inside == "." else f"/{inside}")


def _noted_folder(path: Path) -> Path | None:
    """The folder with an address that the path is, or is in; None if there is none."""
    return next((folder for folder in (path, *path.parents) if folder in _origins), None) if _origins else None
