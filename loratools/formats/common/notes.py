"""What an adapter carries along from its source, for a format that has a place for it.

`Adapter.notes` has one mapping per format: `config` for its config file, `metadata` for the texts of a safetensors
header. A format writes back its own config, and the texts of any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from loratools.adapter import Adapter

# Says which library reads the file back: every format says its own.
_OWN = ("format",)


def notes_of(adapter: Adapter, format: str, part: str) -> Mapping[str, object] | None:
    """A mapping that the adapter's source had, if it was of this format."""
    notes = adapter.notes.get(format)
    found = notes.get(part) if isinstance(notes, Mapping) else None
    return found if isinstance(found, Mapping) else None


def metadata_of(adapter: Adapter) -> dict[str, str]:
    """The texts of the source's header, whatever format it was."""
    found: dict[str, str] = {}
    for format in adapter.notes:
        texts = notes_of(adapter, format, "metadata") or {}
        found |= {str(k): str(v) for k, v in texts.items() if k not in _OWN}
    return found


def names_digest(targets: Iterable[str], replaced: Iterable[str]) -> str:
    """Tells whether an adapter still has the names that were read: then the config's lists of names still hold."""
    import hashlib

    lines = [*(f"target {name}" for name in sorted(targets)), *(f"replaced {name}" for name in sorted(replaced))]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()[:16]
