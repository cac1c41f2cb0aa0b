"""Hugging Face: one `model.safetensors`, or shards and the index that says which tensor is in which.

    FOLDER/model.safetensors.index.json   weight_map: tensor -> shard
    FOLDER/model-00001-of-00003.safetensors
    FOLDER/config.json, tokenizer.json, ...

Where there is neither, the only variant will do: model.fp16.safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loratools.checkpoints import Checkpoint, WeightFile
from loratools.checkpoints._others import adapter_refusal, is_adapter, is_adapter_file
from loratools.checkpoints._paths import fault_of, leads_out, names_in
from loratools.checkpoints._side_files import STRAY_SHARD, sort_out
from loratools.checkpoints._tied import tied_weights
from loratools.errors import FormatError, InputError, UsageError
from loratools.quantization import recognise
from loratools.storage.files import quoted
from loratools.storage.json_file import read_json
from loratools.storage.safetensors_reader import read_header

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
_MAX_INDEX_BYTES = 64_000_000
# A classifier of 22,000 classes has all of their names, twice, in its config.
_MAX_CONFIG_BYTES = 16_000_000
_VARIANT = re.compile(r"model\.[^.]+\.safetensors|model\.safetensors\.index\.[^.]+\.json")
_NUMBERED = re.compile(r"(.*)-\d{5}-of-(\d{5})\.safetensors")
_SHARD = re.compile(r".*-\d{5}-of-(\d{5})\.safetensors")
_MOST_DETAILS = 50


@dataclass(frozen=True)
class _Weights:
    files: tuple[WeightFile, ...]
    index: str | None = None
    metadata: Mapping[str, object] | None = None
    warnings: tuple[str, ...] = ()


def detect(path: Path) -> bool:
    """Whether there is a model here, by the names of the files alone."""
    if path.is_dir():
        return _entry_point(names_in(path)) is not None
    return path.suffix == ".safetensors" and not is_adapter_file(path.name)


def open(path: Path) -> Checkpoint:
    """The checkpoint at `path`, a folder or one file of weights.

    The config is looked up beside a file by the name that was given: a link into a cache has none beside its target.
    What else lies beside a file without a config is no business of the model's.

    Raises:
        UsageError: `path` is one shard of several.
        InputError: a file that the model names is outside its folder.
        FormatError: the index and the shards do not fit each other; every fault is named.
        UnsupportedError: it is an adapter.
    """
    folder = path if path.is_dir() else path.parent
    weights = _in_folder(path) if path.is_dir() else _one_file(path)
    stored = {name: tensor for file in weights.files for name, tensor in file.header.tensors.items()}
    if not stored:
        raise FormatError(f"{quoted(path)} has no tensors")
    if is_adapter(stored):
        raise adapter_refusal(path)
    config = _config(folder)
    scheme = recognise(stored, config)
    own = {file.name for file in weights.files} | ({weights.index} if weights.index else set())
    side_files, left_out = sort_out(folder, own) if path.is_dir() or config else ((), ())
    stray = [f"{quoted(left.name)} is {left.why}; it is left out" for left in left_out if left.why == STRAY_SHARD]
    if any(file.header.metadata.get("format") == "mlx" for file in weights.files):
        stray.append("the weights were saved by MLX: names, and the order of axes, may not be those of transformers")
    return Checkpoint(
        path=path,
        layout="huggingface",
        files=weights.files,
        stored=stored,
        weights=stored,
        index_metadata=weights.metadata,
        config=config,
        tied=tied_weights(stored.keys(), config),
        quantization=scheme.name if scheme is not None else None,
        side_files=side_files,
        left_out=left_out,
        warnings=(*weights.warnings, *stray),
    )


def _entry_point(names: Sequence[str]) -> str | None:
    """The file to begin with: the index, the single file, or else the one variant there is."""
    if "model_index.json" in names:  # a diffusers pipeline
        return None
    if found := [name for name in (_INDEX, _SINGLE) if name in names]:
        return found[0]
    variants = [name for name in names if _VARIANT.fullmatch(name)]
    return variants[0] if len(variants) == 1 else None


def _in_folder(folder: Path) -> _Weights:
    names = names_in(folder)
    entry = _entry_point(names)
    assert entry is not None, "detect has seen it"
    _refuse_ways_out([entry], folder)
    if not entry.endswith(".json"):
        weights = _Weights((WeightFile(entry, read_header(folder / entry)),))
    else:
        weights = _indexed(folder, entry)
        if _SINGLE in names and all(file.name != _SINGLE for file in weights.files):
            raise FormatError(
                f"{quoted(folder)} holds two models: '{_SINGLE}', and the shards of '{entry}'",
                hint=f"move one of them away, or give the file itself: {folder / _SINGLE}",
            )
    if entry in (_INDEX, _SINGLE):
        return weights
    said = f"the only weights are a variant, {quoted(entry)}"
    return _Weights(weights.files, weights.index, weights.metadata, (*weights.warnings, said))


def _one_file(path: Path) -> _Weights:
    shard = _SHARD.fullmatch(path.name)
    if shard and int(shard[1]) > 1:
        raise UsageError(
            f"{quoted(path)} is one of {int(shard[1])} shards of a model", hint=f"give its folder: {path.parent}"
        )
    return _Weights((WeightFile(path.name, read_header(path)),))


def _config(folder: Path) -> Mapping[str, object]:
    if not (folder / _CONFIG).is_file():
        return {}
    _refuse_ways_out([_CONFIG], folder)
    return read_json(folder / _CONFIG, max_bytes=_MAX_CONFIG_BYTES, infinities=True)


def _indexed(folder: Path, name: str) -> _Weights:
    index = read_json(folder / name, max_bytes=_MAX_INDEX_BYTES)
    weight_map = _weight_map(index, folder / name)
    shards = sorted(set(weight_map.values()))
    if faults := [f"{quoted(shard)} {fault}" for shard in shards if (fault := fault_of(shard)) is not None]:
        raise InputError(
            f"{quoted(folder / name)} names {len(faults)} files that cannot be shards beside it",
            details=faults,
            hint="the index is damaged, or made to have other files read; do not trust this model",
        )
    _refuse_ways_out(shards, folder)
    missing = [shard for shard in shards if not (folder / shard).exists()]
    forgotten = [name for name in names_in(folder) if name not in shards and _is_sibling(name, shards)]
    files = tuple(WeightFile(shard, read_header(folder / shard)) for shard in shards if shard not in missing)
    faults = [f"{quoted(shard)} is missing" for shard in missing] + _misfits(weight_map, files, missing)
    faults += [f"{quoted(name)} is a shard of this model by its name, and not in the index" for name in forgotten]
    if faults:
        more = [f"… and {len(faults) - _MOST_DETAILS} more"] if len(faults) > _MOST_DETAILS else []
        raise FormatError(
            f"the index and the shards of {quoted(folder)} do not fit each other in {len(faults)} places",
            details=faults[:_MOST_DETAILS] + more,
            hint="download the missing shards" if len(missing) == len(faults) else "download index and shards again",
        )
    metadata = index.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    return _Weights(files, name, metadata, _size_warning(metadata, files))


def _is_sibling(name: str, shards: Sequence[str]) -> bool:
    """Whether `name` counts to the same total as the shards: model-00002-of-00005 beside model-00001-of-00005."""
    found = _NUMBERED.fullmatch(name)
    return found is not None and any(
        (other := _NUMBERED.fullmatch(shard)) is not None and other.groups() == found.groups() for shard in shards
    )


def _weight_map(index: Mapping[str, object], path: Path) -> dict[str, str]:
    found = index.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise FormatError(f"{quoted(path)} has no weight_map, or an empty one", hint="download it again")
    if wrong := [name for name, shard in found.items() if not isinstance(shard, str)]:
        raise FormatError(f"{quoted(path)} names no file for {len(wrong)} tensors, such as {quoted(wrong[0])}")
    return found


def _refuse_ways_out(names: Sequence[str], folder: Path) -> None:
    if out := [name for name in names if leads_out(folder / name, folder)]:
        raise InputError(
            f"{len(out)} files of {quoted(folder)} are links that lead out of it",
            details=[quoted(name) for name in out],
            hint="copy the files that are meant into the folder",
        )


def _misfits(weight_map: Mapping[str, str], files: Sequence[WeightFile], missing: Sequence[str]) -> list[str]:
    homes: dict[str, list[str]] = {}
    for file in files:
        for name in file.header.tensors:
            homes.setdefault(name, []).append(file.name)
    faults = []
    for name, shards in homes.items():
        said = weight_map.get(name)
        if len(shards) > 1:
            faults.append(f"{quoted(name)} is in {' and in '.join(quoted(shard) for shard in shards)}")
        elif said is None:
            faults.append(f"{quoted(name)} is in {quoted(shards[0])}, and not in the index")
        elif said != shards[0]:
            faults.append(f"{quoted(name)} is in {quoted(shards[0])}; the index says {quoted(said)}")
    return faults + [
        f"{quoted(name)} is not in {quoted(shard)}, where the index says it is"
        for name, shard in weight_map.items()
        if name not in homes and shard not in missing
    ]


def _size_warning(metadata: Mapping[str, object], files: Sequence[WeightFile]) -> tuple[str, ...]:
    """Programs disagree on what the size counts where weights are tied, so that a wrong one is no fault."""
    said = metadata.get("total_size")
    size = sum(tensor.nbytes for file in files for tensor in file.header.tensors.values())
    if isinstance(said, (int, float)) and said != size:
        return (f"the index says that the tensors have {said:,} bytes; they have {size:,}",)
    return ()
