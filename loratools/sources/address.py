"""Addresses of repositories on the hub: `hf://owner/name`, `hf://owner/name@revision/path`, and bare `owner/name`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loratools.errors import UsageError

DEFAULT_REVISION = "main"
# A `Path` writes an address with one slash less.
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/{1,2}(?P<location>[^/].*)", re.DOTALL)
_ELSEWHERE = {"s3": "an object store", "gs": "an object store", "az": "an object store", "http": "the web"}
_ELSEWHERE["https"] = _ELSEWHERE["http"]
_NAME = r"[A-Za-z0-9][\w.-]*"
_BARE = re.compile(rf"{_NAME}/{_NAME}", re.ASCII)
_REPOSITORY = re.compile(rf"(?P<repository>{_NAME}/{_NAME})(?:@(?P<revision>[^@]+?))?(?:/(?P<inside>.+))?", re.ASCII)
# What has one of these suffixes was meant as a file.
_FILES = (".safetensors", ".json", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".yaml", ".yml")


@dataclass(frozen=True)
class HubAddress:
    """A repository on the hub, a revision of it, and a file or folder inside.

    Attributes:
        repository: Its id, `owner/name`.
        revision: A branch, a tag or the hash of a commit.
        inside: The file or folder inside, with slashes; empty for the whole repository.
    """

    repository: str
    revision: str = DEFAULT_REVISION
    inside: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision == DEFAULT_REVISION else f"@{self.revision}"
        return f"hf://{self.repository}{revision}" + (f"/{self.inside}" if self.inside else "")


def parse_address(text: str) -> HubAddress | None:
    """Return the address that a text is; None if it is none, as a path.

    Raises:
        UsageError: It is an address of something that is not read, or none that the hub could have.
    """
    parsed = _SCHEME.fullmatch(text)
    if parsed is None:
        return None
    scheme, location = parsed["scheme"].lower(), parsed["location"]
    if scheme in _ELSEWHERE:
        raise UsageError(
            f"'{scheme}://{_without_credentials(location)}' is an address of {_ELSEWHERE[scheme]}, which is not read; "
            "sources are files, folders and repositories of the Hugging Face hub",
            hint="download it first, and give the file or folder",
        )
    if scheme != "hf":
        return None
    hub_path = _REPOSITORY.fullmatch(location.rstrip("/"))
    inside = hub_path["inside"] or "" if hub_path is not None else ""
    if hub_path is None or any(part in ("", ".", "..") for part in inside.split("/") if inside):
        raise UsageError(
            f"'hf://{location}' names no repository of the hub",
            hint="write hf://OWNER/NAME, hf://OWNER/NAME@REVISION or hf://OWNER/NAME/FOLDER",
        )
    # A branch may have slashes in its name; in an address they are written as %2F.
    revision = (hub_path["revision"] or DEFAULT_REVISION).replace("%2F", "/").replace("%2f", "/")
    return HubAddress(hub_path["repository"], revision, inside)


def bare_repository(text: str) -> HubAddress | None:
    """Return the repository that a text `owner/name` may be; None if it has another form, or that of a file."""
    if _BARE.fullmatch(text) is None or text.lower().endswith(_FILES):
        return None
    return HubAddress(text)


def address_hint(path: str) -> str | None:
    """Return how to write the repository that a missing path may have meant; None if it has another form."""
    address = bare_repository(path)
    return f"for the repository on the Hugging Face hub, write {address}" if address is not None else None


def _without_credentials(location: str) -> str:
    """An address without the user and password before its host, and without its query, which may hold a signature."""
    place = location.partition("?")[0]
    host, slash, path = place.partition("/")
    return host.rpartition("@")[2] + slash + path
