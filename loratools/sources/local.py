"""What a person gives as a source, as a path that every reader takes. Every verb and `load` ask here, and nowhere else.

The first request of an address pins its commit: from then on, and to the end of the process, it means that one.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from loratools.errors import LoraToolsError, MachineError, UsageError
from loratools.sources.address import HubAddress, bare_repository, parse_address
from loratools.sources.cache import opened_cache_folder
from loratools.sources.listener import listener
from loratools.sources.refusals import HubUnreachableError, NotAskedError, not_cached
from loratools.storage.origins import Origin, note_origin

# By the setting of the hub, repository and revision.
_pinned: dict[tuple[tuple[str, str, bool], str, str], Path] = {}
_lock = threading.Lock()


def local_path(source: str | Path) -> Path:
    """Return the path to read a source from.

    Args:
        source: A path, an address on the hub, or `owner/name` where there is no such path.

    Returns:
        The path itself, if it is one, or of a folder of the hub's cache that of its revision. Of an address, a folder
        in which files are fetched when they are read. A path that leads nowhere and is no address is returned as it
        is: whoever opens it says so.

    Raises:
        UsageError: It is an address, and there is no such repository, revision or file.
        MachineError: The hub refuses access, cannot be reached, or is not to be asked.
    """
    path = Path(source)
    text = source if isinstance(source, str) else path.as_posix()
    try:
        if os.path.lexists(path):
            return opened_cache_folder(path) if path.name.startswith("models--") else path
    except (OSError, ValueError):
        return path
    if (address := parse_address(text)) is not None:
        return _of_hub(address)
    # Of a folder that is here, a name in it is missing; nobody is asked for that.
    if (address := bare_repository(text)) is not None and not path.parent.is_dir():
        try:
            return _of_hub(address)
        except (UsageError, MachineError) as error:
            # Where nothing was asked, it is a path that does not exist, as far as is known.
            kind = UsageError if isinstance(error, NotAskedError) else type(error)
            raise kind(
                f"there is no file or folder '{text}'; as a repository of the hub: {error.message}", hint=error.hint
            ) from error
    return path


def _of_hub(address: HubAddress) -> Path:
    from loratools.sources import hub

    hub.require_package(address)
    with _lock:
        key = hub.setting(), address.repository, address.revision
        if key not in _pinned:
            _pinned[key] = _pinned_folder(address)
        folder = _pinned[key]
    path = folder / address.inside if address.inside else folder
    if not path.exists():
        raise UsageError(
            f"there is no '{address.inside}' in 'hf://{address.repository}' at this revision",
            hint=f"there are: {', '.join(sorted(each.name for each in folder.iterdir())[:20])}",
        )
    return path


def _pinned_folder(address: HubAddress) -> Path:
    from loratools.sources import hub
    from loratools.sources.mirror import mirrored

    note = None
    try:
        if hub.is_offline():
            raise not_cached(address)
        revision = hub.look_up(address)
    except MachineError as error:
        snapshot = hub.cached_snapshot(address)
        if snapshot is None or not (hub.is_offline() or isinstance(error, HubUnreachableError)):
            raise
        note = "as it is in the hub's cache" + ("" if hub.is_offline() else f", because {_lowered(error)}")
        folder, commit = snapshot, snapshot.name
        note_origin(folder, Origin(address.repository, commit))
    else:
        folder, commit = mirrored(revision), revision.commit
    if (current := listener.get()) is not None:
        current.pinned(str(address), commit, note)
    return folder


def _lowered(error: LoraToolsError) -> str:
    return error.message[:1].lower() + error.message[1:]
