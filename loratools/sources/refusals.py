"""What the Hugging Face hub refuses, and what keeps it from being asked, as errors of ours with the next command.

Tokens are found by huggingface_hub and never printed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from loratools.errors import LoraToolsError, MachineError, UsageError
from loratools.short_repr import printable
from loratools.sources.address import DEFAULT_REVISION, HubAddress

_Result = TypeVar("_Result")

_TOO_MANY, _FORBIDDEN, _UNAUTHORISED = 429, 403, 401
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")


class HubUnreachableError(MachineError):
    """The hub gave no answer at all."""


class NotAskedError(MachineError):
    """Nothing could be asked of the hub from here: offline, or without huggingface_hub."""


def answered(ask: Callable[[], _Result], place: HubAddress) -> _Result:
    """Return what a call of huggingface_hub returns; what it raises is raised as an error of ours."""
    try:
        return ask()
    except LoraToolsError:
        raise
    except Exception as error:
        raise _as_ours(error, place) from error


def _as_ours(error: Exception, place: HubAddress) -> LoraToolsError:
    from huggingface_hub import errors

    repository = HubAddress(place.repository)
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = _reason(error)
    match error:
        case errors.GatedRepoError():
            return MachineError(
                f"access to '{repository}' must be granted by its owners: {reason}",
                hint=f"ask for access at https://huggingface.co/{place.repository}, then log in: hf auth login",
            )
        case errors.DisabledRepoError():
            return MachineError(f"'{repository}' is disabled on the hub: {reason}")
        case errors.RepositoryNotFoundError():
            return UsageError(
                f"there is no repository '{place.repository}' on the hub, or it is private and needs a login",
                hint="check the spelling; for a private repository: hf auth login",
            )
        case errors.RevisionNotFoundError():
            return UsageError(
                f"'{repository}' has no revision '{place.revision}'",
                hint=f"its revisions are listed at https://huggingface.co/{place.repository}/tree/{DEFAULT_REVISION}",
            )
        case errors.EntryNotFoundError():
            return UsageError(f"there is no file '{place}'", hint="the repository has changed; start again")
        case errors.OfflineModeIsEnabled():
            return not_cached(place)
        case errors.HfHubHTTPError() if status == _TOO_MANY:
            return MachineError(
                f"the hub has had too many requests and answers none for '{place}': {reason}",
                hint="wait some minutes; with a login more requests are answered: hf auth login",
            )
        case errors.HfHubHTTPError() if status in (_UNAUTHORISED, _FORBIDDEN):
            return MachineError(f"the hub refuses access to '{place}': {reason}", hint="hf auth login")
        case errors.HfHubHTTPError():
            return MachineError(f"the hub could not give '{place}': {reason}", hint="try again later")
        case OSError() if error.errno is not None and getattr(error, "filename", None) is not None:
            from loratools.storage.files import machine_error

            return machine_error(error, "download", Path(str(error.filename)))
        case _:
            return HubUnreachableError(
                f"the hub could not be reached for '{place}': {reason}",
                hint="check the network; --offline uses what is in the hub's cache",
            )


def not_cached(place: HubAddress) -> NotAskedError:
    """Return the error that something is not in the cache while nothing may be asked of the hub."""
    return NotAskedError(
        f"'{place}' is not in the hub's cache, and nothing is asked of the hub: offline",
        hint=f"with a network: hf download {place.repository}"
        + (f" --revision {place.revision}" if place.revision != DEFAULT_REVISION else ""),
    )


def _reason(error: Exception) -> str:
    """What the hub says, on one line, without what looks like a token or the addresses of requests."""
    text = getattr(error, "server_message", None) or str(error).strip().partition("\n")[0] or type(error).__name__
    text = re.sub(r"\s+for url[: ].*| \(Request ID.*?\)", "", " ".join(str(text).split()))
    return printable(_TOKEN.sub("hf_…", text))[:300].rstrip(".")
