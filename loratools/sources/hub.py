"""The Hugging Face hub through huggingface_hub: what a revision holds, ranges of its files, and whole files.

Repeats what the hub asks to repeat (too many requests, a failure of its own, a cut connection) a few times. What it
refuses is raised as an error of ours (`refusals`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from loratools.errors import InputError, MachineError
from loratools.sources.address import HubAddress
from loratools.sources.cache import folder_name, is_commit, snapshot_of
from loratools.sources.listener import listener, offline
from loratools.sources.refusals import HubUnreachableError, NotAskedError, answered

_TRIES = 3
_SECONDS = 20.0


@dataclass(frozen=True)
class Revision:
    """A revision of a repository: a commit, and what it holds.

    Attributes:
        repository: The id of the repository.
        asked: The branch, tag or hash that was asked for.
        commit: The hash of the commit.
        sizes: The size of each file in bytes, by its name with slashes.
        modified: When it was last modified, in seconds since 1970; None if the hub does not say.
    """

    repository: str
    asked: str
    commit: str
    sizes: Mapping[str, int]
    modified: float | None = None


def require_package(address: HubAddress) -> None:
    """Raise MachineError where huggingface_hub is not installed."""
    from importlib.util import find_spec

    if find_spec("huggingface_hub") is None:
        raise NotAskedError(
            f"'{address}' is on the Hugging Face hub, and huggingface_hub is not installed",
            hint="pip install 'loratools[hub]'",
        )


def setting() -> tuple[str, str, bool]:
    """Return what answers depend on: the address of the hub, the folder of its cache, and whether it may be asked."""
    from huggingface_hub import constants

    return constants.ENDPOINT, constants.HF_HUB_CACHE, is_offline()


def is_offline() -> bool:
    """Whether nothing may be asked of the hub: --offline, or HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return offline.get() or bool(constants.HF_HUB_OFFLINE)


def cached_snapshot(address: HubAddress) -> Path | None:
    """Return the folder in the hub's cache with the files of a revision; None if it has none of it."""
    from huggingface_hub import constants

    return snapshot_of(Path(constants.HF_HUB_CACHE) / folder_name(address.repository), address.revision)


def cached_file(revision: Revision, name: str) -> Path | None:
    """Return where the hub's cache has a file; None if it has it not."""
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE) / folder_name(revision.repository) / "snapshots" / revision.commit / name
    return place if place.is_file() else None


def look_up(address: HubAddress) -> Revision:
    """Ask the hub which commit a revision is now, and what is in it: one request.

    Raises:
        UsageError: There is no such repository or revision.
        MachineError: The hub refuses access or cannot be reached.
        InputError: Its answer cannot be understood.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
        http_backoff,
    )

    def ask() -> Any:
        response = http_backoff(
            "GET",
            f"{constants.ENDPOINT}/api/models/{address.repository}/revision/{quote(address.revision, safe='')}",
            params={"blobs": "true"},
            headers=build_hf_headers(),
            timeout=_SECONDS,
            follow_redirects=True,
            max_retries=_TRIES,
        )
        hf_raise_for_status(response)
        return response.json()

    answer = answered(ask, address)
    try:
        commit = answer["sha"]
        sizes = {file["rfilename"]: file["size"] for file in answer["siblings"]}
        well_formed = is_commit(commit) and all(isinstance(size, int) and size >= 0 for size in sizes.values())
    except (KeyError, TypeError):
        well_formed = False
    if not well_formed or any(_leads_out(name) for name in sizes):
        raise InputError(f"the hub's list of the files of '{address}' cannot be understood", hint="try again later")
    return Revision(address.repository, address.revision, commit, sizes, _seconds(answer.get("lastModified")))


def fetch_range(revision: Revision, name: str, start: int, stop: int) -> bytes:
    """Return bytes of a file by one request.

    Raises:
        MachineError: The hub refuses access, cannot be reached or sends something else.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    url = hf_hub_url(revision.repository, name, revision=revision.commit)
    # Compressed, the bytes of the range would be others.
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}

    def ask() -> bytes:
        data = bytearray()
        with http_stream_backoff(
            "GET", url, headers=headers, timeout=_SECONDS, follow_redirects=True, max_retries=_TRIES
        ) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            # One that ignores the range sends the file from its beginning.
            enough = stop if response.status_code == 200 else stop - start
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= enough:
                    break
        return bytes(data[start:stop] if response.status_code == 200 else data)

    place = HubAddress(revision.repository, revision.commit, name)
    for attempt in range(_TRIES):
        try:
            data = answered(ask, place)
        except HubUnreachableError:
            if attempt == _TRIES - 1:
                raise
            continue
        if len(data) == stop - start:
            return data
    raise MachineError(
        f"the hub sent {len(data):,} bytes of '{place}' where {stop - start:,} were asked for",
        hint="try again; what was downloaded whole is kept",
    )


def download(revision: Revision, name: str) -> Path:
    """Bring a file into the hub's own cache, going on with what is there of it, and return where it is.

    Raises:
        MachineError: The hub refuses access or cannot be reached, or the disk is full.
    """
    from huggingface_hub import hf_hub_download

    place = HubAddress(revision.repository, revision.commit, name)
    if (cached := cached_file(revision, name)) is not None:
        return cached
    current = listener.get()
    if current is None:
        path = answered(lambda: hf_hub_download(revision.repository, name, revision=revision.commit), place)
    else:
        with current.downloading(str(place), revision.sizes[name]) as advance:
            bar = _bar_that_calls(advance)
            path = answered(
                lambda: hf_hub_download(revision.repository, name, revision=revision.commit, tqdm_class=bar), place
            )
    _note_revision(revision)
    return Path(path)


def _note_revision(revision: Revision) -> None:
    """Note in the hub's cache which commit a branch or tag is, as huggingface_hub does where it looks one up itself.

    Without that, what was downloaded could be had offline by the hash of the commit alone.
    """
    from huggingface_hub import constants

    if is_commit(revision.asked):
        return
    reference = Path(constants.HF_HUB_CACHE) / folder_name(revision.repository) / "refs" / revision.asked
    with suppress(OSError):  # of use for a later run, and no part of this one
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(revision.commit, encoding="ascii")


def _bar_that_calls(advance: Callable[[int], None]) -> type[Any]:
    """A progress bar of the kind that huggingface_hub takes, which draws nothing and calls."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Forwarding(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            initial = kwargs.get("initial") or 0
            super().__init__(disable=True)
            advance(int(initial))  # what an earlier run has brought

        def update(self, n: float | None = 1) -> bool | None:
            advance(int(n or 0))
            return None

    return Forwarding


def _seconds(text: object) -> float | None:
    """A time as the hub writes it, in seconds since 1970; None if it is none."""
    try:
        return datetime.fromisoformat(str(text).replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError):
        return None


def _leads_out(name: object) -> bool:
    """Whether a name in a list of files is not that of a file below the folder of the repository."""
    if not isinstance(name, str) or not name or "\\" in name or ":" in name or not name.isprintable():
        return True
    return any(part in ("", ".", "..") or len(part.encode()) > 255 for part in name.split("/"))
