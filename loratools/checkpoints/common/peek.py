"""What tells layouts apart that call their files the same: the first bytes of a header.

A file that cannot be read is nobody's here; the layout that its name belongs to will say what is wrong with it.
"""

from __future__ import annotations

from pathlib import Path

from loratools.checkpoints.common.weights import TRANSFORMERS, first_file
from loratools.errors import LoraToolsError
from loratools.storage.safetensors_reader import SafetensorsFile, read_header
from loratools.storage.torch_pickle import read_pickle

# Where LDM keeps its denoiser, and ComfyUI's single files whatever they hold.
ORIGINAL_PREFIX = "model.diffusion_model."
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def is_mlx(path: Path) -> bool:
    """Whether the weights of a folder or file were saved by MLX, by what they say of themselves."""
    try:
        file = first_file(path, TRANSFORMERS) if path.is_dir() else path
    except LoraToolsError:
        return False
    header = _header(file) if file is not None else None
    return header is not None and header.metadata.get("format") == "mlx"


def is_original(path: Path) -> bool:
    """Whether a file holds an image model under the names of its first publication."""
    if path.suffix == ".safetensors":
        header = _header(path)
        names = list(header.tensors) if header is not None else []
    elif path.suffix in PICKLES:
        try:
            names = list(read_pickle(path).tensors)
        except LoraToolsError:
            names = []
    else:
        return False
    return any(name.startswith(ORIGINAL_PREFIX) for name in names)


def _header(path: Path) -> SafetensorsFile | None:
    try:
        return read_header(path) if path.is_file() else None
    except LoraToolsError:
        return None
