"""Hugging Face: one `model.safetensors`, or shards and the index that says which tensor is in which.

    FOLDER/model.safetensors.index.json   weight_map: tensor -> shard
    FOLDER/model-00001-of-00003.safetensors
    FOLDER/config.json, tokenizer.json, ...

Where there is neither, the only variant will do: model.fp16.safetensors.
"""

from __future__ import annotations

from pathlib import Path

from loratools.checkpoints import Checkpoint
from loratools.checkpoints.common.model import open_model
from loratools.checkpoints.common.paths import names_in
from loratools.checkpoints.common.peek import is_mlx, is_original
from loratools.checkpoints.common.unsupported import is_adapter_file
from loratools.checkpoints.common.weights import TRANSFORMERS, read_folder, read_single_file


def detect(path: Path) -> bool:
    """Whether there is a model here, by the names of the files, where another layout has none of the same."""
    if path.is_dir():
        names = names_in(path)
        if "model_index.json" in names or TRANSFORMERS.entry_point(names) is None:
            return False
        return not is_mlx(path)
    if path.suffix != ".safetensors" or is_adapter_file(path.name) or path.name.startswith("consolidated"):
        return False
    return not is_mlx(path) and not is_original(path)


def open(path: Path) -> Checkpoint:
    """The checkpoint at `path`, a folder or one file of weights.

    The config is looked up beside a file by the name that was given: a link into a cache has none beside its target.
    What else lies beside a file without a config is no business of the model's.

    Raises:
        UsageError: `path` is one shard of several.
        InputError: A file that the model names is outside its folder.
        FormatError: The index and the shards do not fit each other; every fault is named.
        UnsupportedError: It is an adapter.
    """
    weights = read_folder(path, TRANSFORMERS) if path.is_dir() else read_single_file(path, TRANSFORMERS)
    return open_model(path, "huggingface", weights)
