"""Folders with the state dict of a whole PeftModel, as trainers of sharded models leave them.

FOLDER/model.safetensors, pytorch_model.bin, pytorch_model_fsdp.bin, or the shards of one of the first two
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from loratools.checkpoints.common.dumped import is_dump
from loratools.errors import LoraToolsError

_ONE_FILE = ("model.safetensors", "pytorch_model.bin", "pytorch_model_fsdp.bin")
_SHARD = re.compile(r"(model|pytorch_model)-\d{5}-of-\d{5}\.(safetensors|bin)")


def dumped_files(folder: Path, names: Collection[str]) -> list[Path]:
    """The files of a folder that hold the state dict of a whole PeftModel; none where no file does.

    Args:
        folder: The folder.
        names: Names of the files in it.
    """
    groups = [[name] for name in _ONE_FILE if name in names]
    groups += [sorted(name for name in names if _SHARD.fullmatch(name))]
    for group in filter(None, groups):
        files = [folder / name for name in group]
        if is_dump(name for file in files for name in _names_in(file)):
            return files
    return []


def _names_in(file: Path) -> Collection[str]:
    try:
        if file.suffix == ".safetensors":
            from loratools.storage.safetensors_reader import read_header

            return read_header(file).tensors
        from loratools.storage.torch_pickle import read_pickle

        return read_pickle(file).tensors
    except LoraToolsError:
        return ()  # damaged: opening it as a model reports that
