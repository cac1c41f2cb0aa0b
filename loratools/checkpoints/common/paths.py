"""Which files a checkpoint may name: those in its own folder, and in the cache that its folder is a view of.

Files that a model names are read, and their tensors copied into the output, so a name that leads elsewhere would let an
untrusted model choose files to leak from this machine.
"""

from __future__ import annotations

import os
from pathlib import Path

from loratools.storage.files import machine_error

# The usual limit of file systems for one name.
_MAX_NAME = 255


def fault_of(name: str, suffix: str = ".safetensors") -> str | None:
    """What keeps a name in an index from being the plain name of a file of weights; None if nothing does."""
    if not name:
        return "is empty"
    if len(name.encode("utf-8", "replace")) > _MAX_NAME:
        return f"has {len(name):,} characters"
    if not name.isprintable():
        return "has unprintable characters"
    # Either slash, and the colon of drives, streams and addresses, whatever system the model is opened on.
    if any(c in name for c in "/\\:"):
        return "is not the plain name of a file"
    if name.startswith("."):
        return "is a hidden file or a folder"
    if not name.endswith(suffix):
        return f"does not end in {suffix}"
    return None


def leads_out(path: Path, folder: Path) -> bool:
    """Whether the file at `path`, links followed, is outside `folder` and of the blobs that its cache shares."""
    home = Path(os.path.realpath(folder))
    real = Path(os.path.realpath(path))
    if real.is_relative_to(home):
        return False
    # huggingface_hub: models--owner--name/snapshots/REVISION/model.safetensors -> ../../blobs/SHA256
    caches = [parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots"]
    return not any(real.parent == cache for cache in caches)


def names_in(folder: Path) -> list[str]:
    """Names of what is in the folder, sorted."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise machine_error(error, "look into", folder) from error
