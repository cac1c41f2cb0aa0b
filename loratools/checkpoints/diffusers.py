"""Diffusers: a pipeline, or one of its components.

    FOLDER/model_index.json               component -> [library, class]
    FOLDER/unet/diffusion_pytorch_model.safetensors, config.json
    FOLDER/text_encoder/model.safetensors, config.json
    FOLDER/scheduler/..., tokenizer/...   come along

The weights of a pipeline are called as in their files, with the component before them: `unet.conv_in.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from loratools.checkpoints import Checkpoint
from loratools.checkpoints.common.model import open_model, without_repetitions
from loratools.checkpoints.common.paths import names_in
from loratools.checkpoints.common.side_files import sort_out
from loratools.checkpoints.common.tied import tied_weights
from loratools.checkpoints.common.weights import (
    DIFFUSERS,
    DIFFUSERS_PICKLED,
    TRANSFORMERS,
    TRANSFORMERS_PICKLED,
    Weights,
    read_config,
    read_folder,
    refuse_ways_out,
)
from loratools.checkpoints.pytorch import result_is_safetensors
from loratools.errors import FormatError, InputError
from loratools.quantization import Quantisation, recognise
from loratools.storage.files import quoted
from loratools.storage.json_file import read_json
from loratools.tensors.lazy import LazyTensor

_INDEX = "model_index.json"
_NAME = re.compile(r"[A-Za-z]\w*")
_SPELLINGS = (DIFFUSERS, TRANSFORMERS, DIFFUSERS_PICKLED, TRANSFORMERS_PICKLED)
_WEIGHTS = (".safetensors", ".bin", ".msgpack", ".onnx", ".gguf", ".h5")


def detect(path: Path) -> bool:
    """Whether there is a pipeline, or a component whose files are called as diffusers does."""
    if not path.is_dir():
        return False
    names = names_in(path)
    return _INDEX in names or (
        TRANSFORMERS.entry_point(names) is None
        and any(s.entry_point(names) is not None for s in (DIFFUSERS, DIFFUSERS_PICKLED))
    )


def open(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`.

    Raises:
        InputError: The pipeline names a component outside its folder.
        FormatError: A component has no weights that can be read, or its shards do not fit their index.
    """
    if (path / _INDEX).is_file():
        return _pipeline(path)
    weights = _weights(path)
    assert weights is not None, "`detect` has seen it"
    checkpoint = open_model(path, "diffusers", weights)
    return replace(checkpoint, warnings=(*checkpoint.warnings, *_pickled(path, weights)))


def _pipeline(path: Path) -> Checkpoint:
    refuse_ways_out([_INDEX], path)
    parts: list[Weights] = []
    configs: dict[str, object] = {}
    names = _components(path)
    for name in names:
        weights = _weights(path / name)
        if weights is not None:
            parts.append(weights.inside(name, f"{name}."))
            configs[name] = read_config(path / name)
    stored = {n: tensor for weights in parts for n, tensor in weights.component.tensors.items()}
    if not stored:
        raise FormatError(f"none of the components of the pipeline {quoted(path)} has weights")
    quantisation = _quantisation(parts, configs)
    file_names = frozenset(name for weights in parts for name in weights.file_names)
    side_files, left_out = sort_out(path, file_names, parts=frozenset(names))
    return Checkpoint(
        path=path,
        layout="diffusers",
        components=tuple(weights.component for weights in parts),
        stored=stored,
        weights=quantisation.logical(stored) if quantisation is not None else stored,
        config=configs,
        config_file=None,
        tied=_tied(parts, configs),
        quantisation=quantisation,
        side_files=side_files,
        left_out=left_out,
        warnings=tuple(w for weights in parts for w in (*weights.warnings, *_pickled(path, weights))),
    )


def _components(path: Path) -> list[str]:
    """The folders that the pipeline names, in its order."""
    index = read_json(path / _INDEX)
    names = [name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None]
    if wrong := [name for name in names if not _NAME.fullmatch(name)]:
        raise InputError(
            f"{quoted(path / _INDEX)} names {len(wrong)} components that cannot be folders beside it",
            details=[quoted(name) for name in wrong],
            hint="the index is damaged, or made to have other files read; do not trust this model",
        )
    folders = [name for name in names if (path / name).is_dir()]
    refuse_ways_out(folders, path)
    return folders


def _weights(folder: Path) -> Weights | None:
    """The weights of a component; None if it is one without, as a tokenizer."""
    names = names_in(folder)
    spelling = next((s for s in _SPELLINGS if s.entry_point(names) is not None), None)
    if spelling is not None:
        weights = read_folder(folder, spelling)
        return without_repetitions(weights, read_config(folder)) if spelling.is_pickle else weights
    if files := [name for name in names if name.endswith(_WEIGHTS)]:
        raise FormatError(
            f"the component {quoted(folder)} has no weights that can be read",
            details=[quoted(name) for name in files],
            hint="download its safetensors; where there are several variants, keep the one that is meant",
        )
    return None


def _pickled(path: Path, weights: Weights) -> tuple[str, ...]:
    changed = any(file.name != file.saved_as for file in weights.component.files)
    return (result_is_safetensors(path / weights.component.folder),) if changed else ()


def _tied(parts: list[Weights], configs: Mapping[str, object]) -> dict[str, str]:
    tied: dict[str, str] = {}
    for part, names, config in _each(parts, configs):
        tied_here = tied_weights(names.keys(), config)
        tied |= {part + absent: part + source for absent, source in tied_here.items()}
    return tied


def _quantisation(parts: list[Weights], configs: Mapping[str, object]) -> Quantisation | None:
    """How the weights of the components are packed, by the names that they have in the pipeline."""
    each = [(prefix, recognise(tensors, config)) for prefix, tensors, config in _each(parts, configs)]
    packed = [recognised.with_prefix(prefix) for prefix, recognised in each if recognised is not None]
    if not packed:
        return None
    return Quantisation(
        {name: weight for recognised in packed for name, weight in recognised.weights.items()},
        {name: weight for recognised in packed for name, weight in recognised.unreadable.items()},
        tuple(name for recognised in packed for name in recognised.markers),
        next((recognised.declared for recognised in packed if recognised.declared is not None), None),
    )


def _each(
    parts: list[Weights], configs: Mapping[str, object]
) -> list[tuple[str, dict[str, LazyTensor], Mapping[str, object]]]:
    """Prefix, tensors by their own names, and config of each component."""
    entries = []
    for weights in parts:
        prefix = weights.component.prefix
        config = configs[prefix.removesuffix(".")]
        assert isinstance(config, Mapping)
        file_names = {name.removeprefix(prefix): tensor for name, tensor in weights.component.tensors.items()}
        entries.append((prefix, file_names, config))
    return entries
