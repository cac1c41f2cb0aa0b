"""PyTorch: `pytorch_model.bin`, or shards and their index, as transformers saved them before safetensors.

    FOLDER/pytorch_model.bin.index.json   weight_map: tensor -> shard
    FOLDER/pytorch_model-00001-of-00002.bin
    FOLDER/config.json, ...

The pickles are read without running anything of them, and never written: results are safetensors.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loratools.checkpoints import Checkpoint
from loratools.checkpoints.common.model import open_model, without_repetitions
from loratools.checkpoints.common.paths import names_in
from loratools.checkpoints.common.peek import PICKLES, is_original
from loratools.checkpoints.common.unsupported import is_adapter_file
from loratools.checkpoints.common.weights import (
    DIFFUSERS,
    DIFFUSERS_PICKLED,
    TRANSFORMERS,
    TRANSFORMERS_PICKLED,
    Spelling,
    read_config,
    read_folder,
    read_single_file,
)


def detect(path: Path) -> bool:
    """Whether there are pickles of a model here, and nothing better."""
    if path.is_dir():
        names = names_in(path)
        other_layouts = any(s.entry_point(names) for s in (TRANSFORMERS, DIFFUSERS, DIFFUSERS_PICKLED))
        return (
            "model_index.json" not in names
            and not other_layouts
            and TRANSFORMERS_PICKLED.entry_point(names) is not None
        )
    named = path.suffix in PICKLES and not is_adapter_file(path.name) and not path.name.startswith("consolidated")
    return named and not is_original(path)


def open(path: Path) -> Checkpoint:
    """The checkpoint at `path`, a folder or one pickle; raises the same errors as for a Hugging Face folder."""
    if path.is_dir():
        weights = read_folder(path, TRANSFORMERS_PICKLED)
    else:
        spelling = (
            TRANSFORMERS_PICKLED if path.name == TRANSFORMERS_PICKLED.single else Spelling(path.stem, path.suffix)
        )
        weights = read_single_file(path, spelling)
    weights = without_repetitions(weights, read_config(path if path.is_dir() else path.parent))
    checkpoint = open_model(path, "pytorch", weights)
    return replace(checkpoint, warnings=(*checkpoint.warnings, result_is_safetensors(path)))


def result_is_safetensors(path: Path) -> str:
    """That a result does not look like its base."""
    return f"'{path.name}' is stored as pickles; the result is written as safetensors"
