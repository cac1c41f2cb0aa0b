"""A whole model on disk: one file per layout, and the types that they share.

A layout's file has `detect(path) -> bool`, which looks at names alone, and `open(path) -> Checkpoint`.
Opening reads headers and JSON, never values; no code that comes with a model is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from loratools import registry
from loratools.errors import FormatError, UsageError
from loratools.storage.files import quoted
from loratools.tensors import LazyTensor

if TYPE_CHECKING:
    from loratools.storage.safetensors_reader import SafetensorsFile

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class WeightFile:
    """A file of weights: its name relative to the checkpoint, and its header."""

    name: str
    header: SafetensorsFile


@dataclass(frozen=True)
class SideFile:
    """A file that belongs to the model and holds none of its weights: `name` is relative, with forward slashes."""

    name: str
    path: Path


@dataclass(frozen=True)
class LeftOut:
    """What lies in the folder and is not part of the model; the name of a whole folder ends with a slash."""

    name: str
    why: str


@dataclass(frozen=True)
class Checkpoint:
    """Immutable. Everything in its folder is a weight file, the index, a side file, or left out.

    `stored` are the tensors on disk, in file order; `weights` the logical ones, the same unless they are quantised.
    `tied` are weights that are absent on disk because they follow a stored one: `lm_head.weight` -> the embedding.
    `quantization` is the scheme's name; None where the weights are plain numbers.
    """

    path: Path
    layout: str
    files: tuple[WeightFile, ...]
    stored: Mapping[str, LazyTensor]
    weights: Mapping[str, LazyTensor]
    index_metadata: Mapping[str, object] | None = None
    config: Mapping[str, object] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    quantization: str | None = None
    side_files: tuple[SideFile, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """How messages call it."""
        return str(self.path)


def open_checkpoint(path: Path) -> Checkpoint:
    """The whole model at `path`, a folder or a file, from its headers.

    Raises:
        UsageError: there is nothing at `path`.
        UnsupportedError: it is something else that has a name, or a model stored in a way that is not read.
        FormatError: it is no model.
        InputError: its files do not fit each other, or one leads out of the folder.
    """
    _ensure_present(path)
    layouts = [name for name in registry.names("checkpoints") if registry.load("checkpoints", name).detect(path)]
    if len(layouts) > 1:
        raise FormatError(f"{quoted(path)} could be stored as {' or '.join(layouts)}")
    if not layouts:
        from loratools.checkpoints._others import refusal

        raise refusal(path)
    found: Checkpoint = registry.load("checkpoints", layouts[0]).open(path)
    return found


def _ensure_present(path: Path) -> None:
    try:
        present = path.exists()
    except (OSError, ValueError):
        # ValueError: a NUL in the name, which no file has.
        present = False
    if present:
        return
    if path.is_symlink():
        raise UsageError(f"{quoted(path)} is a link that leads nowhere")
    download = f"to use a model of the Hugging Face Hub, download it first: hf download {path} --local-dir FOLDER"
    raise UsageError(f"there is no file or folder {quoted(path)}", hint=download if _is_hub_name(path) else None)


def _is_hub_name(path: Path) -> bool:
    """Whether the path looks like owner/name, and not like one in a folder that there is."""
    is_file = path.suffix in (".safetensors", ".json", ".gguf", *_PICKLES)
    return bool(_HUB_NAME.fullmatch(path.as_posix())) and not is_file and not path.parent.is_dir()
