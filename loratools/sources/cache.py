"""The hub's own cache on this machine, as huggingface_hub lays it out.

models--owner--name/refs/REVISION            the hash of the commit
models--owner--name/snapshots/COMMIT/...     its files, as links into blobs/
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from loratools.errors import LoraToolsError, UsageError
from loratools.sources.address import DEFAULT_REVISION
from loratools.storage.files import quoted, read_whole

# The oldest models of the hub have no owner: models--gpt2.
_FOLDER = re.compile(r"models--([^/\\]+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def folder_name(repository: str) -> str:
    """The name of the folder of a repository in the cache."""
    return f"models--{repository.replace('/', '--')}"


def is_commit(revision: str) -> bool:
    """Whether a revision is the hash of a commit, in full, which is never moved."""
    return _COMMIT.fullmatch(revision) is not None


@dataclass(frozen=True)
class CachedRepository:
    """What a path in the hub's cache, or in a folder that is laid out as one, is of.

    Attributes:
        repository: The id of the repository, `owner/name`; of the oldest models, `name`.
        commit: The hash of the commit; None of the folder of the repository itself.
        inside: The file or folder in it, with slashes; empty for all of it.
    """

    repository: str
    commit: str | None
    inside: str = ""

    @property
    def address(self) -> str:
        """The address on the hub."""
        commit = f"@{self.commit}" if self.commit is not None else ""
        return f"hf://{self.repository}{commit}" + (f"/{self.inside}" if self.inside else "")


def cached_repository(path: Path) -> CachedRepository | None:
    """Return what of the hub lies at a path of its cache; None if the path is in no folder of a repository.

    Example:
        >>> cached_repository(Path("hub/models--meta--llama-9/snapshots/0f3a/checkpoint-10"))
        CachedRepository(repository='meta/llama-9', commit='0f3a', inside='checkpoint-10')
    """
    parts = path.absolute().parts
    for at, part in enumerate(parts):
        if (named := _FOLDER.fullmatch(part)) is not None:
            repository = named[1].replace("--", "/", 1)
            if len(parts) > at + 2 and parts[at + 1] == "snapshots":
                return CachedRepository(repository, parts[at + 2], "/".join(parts[at + 3 :]))
            return CachedRepository(repository, None)
    return None


def snapshot_of(folder: Path, revision: str = DEFAULT_REVISION) -> Path | None:
    """Return the folder with the files of a revision; None if the cache has none of it.

    Args:
        folder: The folder of the repository in the cache.
        revision: A branch, a tag or the hash of a commit.
    """
    commit = revision
    if not is_commit(revision):
        reference = folder / "refs" / revision
        try:
            commit = read_whole(reference).decode("ascii", "replace").strip()
        except LoraToolsError:
            return None
    snapshot = folder / "snapshots" / commit
    return snapshot if is_commit(commit) and snapshot.is_dir() else None


def opened_cache_folder(path: Path) -> Path:
    """Return what to read for a path: of the folder of a repository in the cache, the files of its `main`.

    Raises:
        UsageError: There is no such revision in it, or more than one and none is `main`.
    """
    if _FOLDER.fullmatch(path.name) is None or not (path / "snapshots").is_dir():
        return path
    if (main := snapshot_of(path)) is not None:
        return main
    snapshots = sorted(each for each in (path / "snapshots").iterdir() if each.is_dir())
    if len(snapshots) == 1:
        return snapshots[0]
    raise UsageError(
        f"{quoted(path)} is a folder of the hub's cache with {len(snapshots)} revisions, and none of them is its main",
        details=[str(each) for each in snapshots],
        hint=f"give one of them: {snapshots[0]}" if snapshots else "download the repository again",
    )
