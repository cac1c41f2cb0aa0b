"""A revision as a folder of this machine: every file has its name and its size, and its bytes are fetched when read."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

from loratools.sources import hub
from loratools.sources.cache import folder_name
from loratools.storage.deferred_files import DeferredFile, defer, deferred
from loratools.storage.files import machine_error
from loratools.storage.origins import Origin, note_origin

_root: Path | None = None
_folders: dict[tuple[tuple[str, str, bool], str, str], Path] = {}


def mirrored(revision: hub.Revision) -> Path:
    """Return a folder that has the files of a revision by name and size. It is temporary, and of this process alone.

    Raises:
        MachineError: It cannot be written.
    """
    key = hub.setting(), revision.repository, revision.commit
    if key in _folders:
        return _folders[key]
    # Numbered, so that a repository of the same name on another hub has a folder of its own.
    home = _root_folder() / str(len(_folders))
    folder = home / folder_name(revision.repository) / "snapshots" / revision.commit
    try:
        folder.mkdir(parents=True)
        for name, size in revision.sizes.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as file:  # noqa: PTH123
                file.truncate(size)
            if revision.modified is not None:
                os.utime(path, (revision.modified, revision.modified))
            defer(
                DeferredFile(
                    path,
                    size,
                    partial(hub.fetch_range, revision, name),
                    partial(_download, revision, folder, name),
                    downloaded=hub.cached_file(revision, name),
                )
            )
    except OSError as error:
        raise machine_error(error, "write", folder) from error
    note_origin(folder, Origin(revision.repository, revision.commit))
    _folders[key] = folder
    return folder


def _download(revision: hub.Revision, folder: Path, name: str) -> Path:
    """Bring a file into the hub's cache, and with it every small file of the revision that was read by ranges.

    The weights of an adapter without its config would be another adapter to whoever opens the cache offline.
    """
    path = hub.download(revision, name)
    for other in revision.sizes:
        file = deferred(folder / other)
        if file is not None and file.is_held_whole:
            hub.download(revision, other)
    return path


def _root_folder() -> Path:
    global _root
    if _root is None:
        try:
            _root = Path(os.path.realpath(tempfile.mkdtemp(prefix="loratools-hub-")))
        except OSError as error:
            raise machine_error(error, "write", Path(tempfile.gettempdir())) from error
        atexit.register(_remove, _root, os.getpid())
    return _root


def _remove(root: Path, process: int) -> None:
    # A forked worker ends with the same list of what is to be done at the end.
    if os.getpid() == process:
        shutil.rmtree(root, ignore_errors=True)
