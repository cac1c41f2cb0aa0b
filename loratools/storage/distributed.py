"""Distributed checkpoints of torch (`.distcp`), which hold a part of every tensor in each of their files."""

from __future__ import annotations

import shlex
from pathlib import Path

from loratools.errors import FormatError
from loratools.storage.files import machine_error, quoted

_SUFFIX = ".distcp"


def distributed_checkpoint(folder: Path) -> Path | None:
    """The folder, or the first one in it (`pytorch_model_fsdp_0`), that holds such a checkpoint; None if none does."""
    try:
        inner = sorted(path for path in folder.iterdir() if path.is_dir())
        return next((each for each in (folder, *inner) if any(p.suffix == _SUFFIX for p in each.iterdir())), None)
    except OSError as error:
        raise machine_error(error, "list", folder) from error


def distributed_refusal(folder: Path) -> FormatError:
    """What is said of such a folder, with the command of torch that makes one file of it."""
    return FormatError(
        f"{quoted(folder)} is a distributed checkpoint of torch: each of its files holds parts of tensors",
        details=sorted(path.name for path in folder.iterdir())[:5],
        hint="make one file of it, and give that: python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
        f"{shlex.quote(str(folder))} consolidated.bin",
    )
