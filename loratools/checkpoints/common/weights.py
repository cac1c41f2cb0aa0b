"""The files of weights in a model's folder: a single one, or shards and the index that says which tensor is in which.

    FOLDER/model.safetensors.index.json   weight_map: tensor -> shard
    FOLDER/model-00001-of-00003.safetensors

Other libraries call them otherwise, and pickles have another ending, but all are found in the same way. Where there
is neither a single file nor an index, the only variant will do: model.fp16.safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from loratools.checkpoints import Component, WeightFile
from loratools.checkpoints.common.paths import fault_of, leads_out, names_in
from loratools.errors import FormatError, InputError, UnsupportedError, UsageError
from loratools.short_repr import counted
from loratools.storage.deferred_files import fetch_fronts
from loratools.storage.files import identify, is_there, quoted
from loratools.storage.json_file import read_json
from loratools.storage.safetensors_reader import read_header
from loratools.storage.torch_pickle import read_pickle
from loratools.tensors.dtypes import FLOAT_DTYPES
from loratools.tensors.files import FileId

_MAX_INDEX_BYTES = 64_000_000
# A classifier of 22,000 classes has all of their names, twice, in its config.
_MAX_CONFIG_BYTES = 16_000_000
_NUMBERED = re.compile(r"(.*)-\d{5}-of-(\d{5})\.\w+")
_MOST_DETAILS = 50


@dataclass(frozen=True)
class Spelling:
    """What a library calls its files of weights, and what they are called when they are written as safetensors."""

    stem: str
    suffix: str = ".safetensors"
    saved_stem: str = ""

    @property
    def single(self) -> str:
        return self.stem + self.suffix

    @property
    def index(self) -> str:
        return f"{self.single}.index.json"

    @property
    def is_pickle(self) -> bool:
        return self.suffix != ".safetensors"

    def entry_point(self, names: Sequence[str]) -> str | None:
        """The file to begin with: the index, the single file, or else the one variant there is."""
        if present := [name for name in (self.index, self.single) if name in names]:
            return present[0]
        stem, suffix = re.escape(self.stem), re.escape(self.suffix)
        variant = re.compile(rf"{stem}\.[^.]+{suffix}|{stem}{suffix}\.index\.[^.]+\.json")
        variants = [name for name in names if variant.fullmatch(name)]
        return variants[0] if len(variants) == 1 else None

    def saved(self, name: str) -> str:
        """What a result calls the file `name`."""
        if not self.is_pickle:
            return name
        stem = self.saved_stem or self.stem
        return stem + name.removeprefix(self.stem).removesuffix(self.suffix) + ".safetensors"


TRANSFORMERS = Spelling("model")
TRANSFORMERS_PICKLED = Spelling("pytorch_model", ".bin", "model")
DIFFUSERS = Spelling("diffusion_pytorch_model")
DIFFUSERS_PICKLED = Spelling("diffusion_pytorch_model", ".bin")


@dataclass(frozen=True)
class Weights:
    """The weights of a model and the files that they are in.

    `file_names`: the names of all files that these weights are in, the index with them.
    """

    component: Component
    file_names: frozenset[str]
    warnings: tuple[str, ...] = ()

    def inside(self, folder: str, prefix: str) -> Weights:
        """The same as the weights of a folder of something larger."""
        files = tuple(
            replace(f, name=f"{folder}/{f.name}", saved_as=f"{folder}/{f.saved_as}") for f in self.component.files
        )
        component = replace(self.component, files=files, prefix=prefix, folder=f"{folder}/")
        warnings = tuple(f"{folder}: {warning}" for warning in self.warnings)
        return Weights(component, frozenset(f"{folder}/{name}" for name in self.file_names), warnings)


def read_folder(folder: Path, spelling: Spelling) -> Weights:
    """The weights of a folder that has an entry point in this spelling.

    Raises:
        InputError: A file that is named is outside the folder.
        FormatError: The index and the shards do not fit each other; every fault is named.
    """
    names = names_in(folder)
    entry = spelling.entry_point(names)
    assert entry is not None, "a layout's `detect` has seen it"
    refuse_ways_out([entry], folder)
    if not entry.endswith(".json"):
        weights = _weights([_read(folder / entry, spelling)], entry, spelling)
    else:
        weights = _indexed(folder, entry, spelling)
        if spelling.single in names and all(file.name != spelling.single for file in weights.component.files):
            raise FormatError(
                f"{quoted(folder)} holds two models: '{spelling.single}', and the shards of '{entry}'",
                hint=f"move one of them away, or give the file itself: {folder / spelling.single}",
            )
    if entry not in (spelling.index, spelling.single):
        warning = f"the only weights are a variant, {quoted(entry)}"
        weights = replace(weights, warnings=(*weights.warnings, warning))
    return weights


def first_file(folder: Path, spelling: Spelling) -> Path | None:
    """One of the files of weights that `read_folder` would read; errors as there."""
    entry = spelling.entry_point(names_in(folder))
    if entry is None:
        return None
    refuse_ways_out([entry], folder)
    if not entry.endswith(".json"):
        return folder / entry
    index = _read_index(folder / entry)
    return folder / _shards(_weight_map(index, folder / entry), folder, entry, spelling)[0]


def read_single_file(path: Path, spelling: Spelling) -> Weights:
    """The weights of one file.

    Raises:
        UsageError: It is one shard of several.
    """
    shard = _NUMBERED.fullmatch(path.name)
    if shard and int(shard[2]) > 1:
        raise UsageError(
            f"{quoted(path)} is one of {int(shard[2])} shards of a model", hint=f"give its folder: {path.parent}"
        )
    return _weights([_read(path, spelling)], path.name, spelling)


def read_config(folder: Path, name: str = "config.json") -> Mapping[str, object]:
    """The config beside the weights; empty if there is none."""
    if not is_there(folder / name):
        return {}
    refuse_ways_out([name], folder)
    return read_json(folder / name, max_bytes=_MAX_CONFIG_BYTES, infinities=True)


def refuse_ways_out(names: Sequence[str], folder: Path) -> None:
    """Raise InputError where a file in `folder` is a link to somewhere else."""
    if out := [name for name in names if leads_out(folder / name, folder)]:
        raise InputError(
            f"{len(out)} files of {quoted(folder)} are links that lead out of it",
            details=[quoted(name) for name in out],
            hint="copy the files that are meant into the folder",
            defect="paths-outside",
        )


def _read(path: Path, spelling: Spelling) -> WeightFile:
    saved = spelling.saved(path.name)
    if not spelling.is_pickle:
        header = read_header(path)
        return WeightFile(path.name, header.file, header.tensors, header.metadata, header.data_offset, saved)
    pickled = read_pickle(path)
    # Bytes that lie in one piece are copied, numbers that are computed with are read; there is no third way.
    if scattered := [
        f"{name}   {t.dtype}"
        for name, t in pickled.tensors.items()
        if t.location is None and t.dtype not in FLOAT_DTYPES
    ]:
        raise UnsupportedError(
            f"{quoted(path)} has {len(scattered)} tensors of whole numbers that are not in one piece",
            details=scattered,
            hint="save it again with .contiguous() tensors",
        )
    return WeightFile(path.name, pickled.file, pickled.tensors, {"format": "pt"}, 0, saved)


def _weights(
    files: Sequence[WeightFile], entry: str, spelling: Spelling, index: Mapping[str, object] | None = None
) -> Weights:
    component = Component(tuple(files), stem=spelling.saved_stem or spelling.stem, index=index)
    return Weights(component, frozenset({entry, *(file.name for file in files)}))


def _read_index(path: Path) -> Mapping[str, object]:
    """The index of a checkpoint; the one read last is kept, since every layout is asked about the same folder."""
    global _last_index
    file = identify(path)
    # As of headers: the time of change cannot be set back.
    key = file, file.ctime_ns
    if _last_index is None or _last_index[0] != key:
        _last_index = key, read_json(path, max_bytes=_MAX_INDEX_BYTES)
    return _last_index[1]


_last_index: tuple[tuple[FileId, int], Mapping[str, object]] | None = None


def _indexed(folder: Path, name: str, spelling: Spelling) -> Weights:
    index = _read_index(folder / name)
    weight_map = _weight_map(index, folder / name)
    shards = _shards(weight_map, folder, name, spelling)
    in_index = set(shards)
    missing = [shard for shard in shards if not (folder / shard).exists()]
    totals = {numbered.groups() for shard in shards if (numbered := _NUMBERED.fullmatch(shard)) is not None}
    forgotten = [name for name in names_in(folder) if name not in in_index and _is_sibling(name, totals)]
    fetch_fronts([folder / shard for shard in shards])
    files = tuple(_read(folder / shard, spelling) for shard in shards if shard not in missing)
    faults = [f"{quoted(shard)} is missing" for shard in missing] + _misfits(weight_map, files, missing)
    faults += [f"{quoted(name)} is a shard of this model by its name, and not in the index" for name in forgotten]
    if faults:
        more = [f"… and {len(faults) - _MOST_DETAILS} more"] if len(faults) > _MOST_DETAILS else []
        raise FormatError(
            f"the index and the shards of {quoted(folder)} do not fit each other in {len(faults)} places",
            details=faults[:_MOST_DETAILS] + more,
            hint="download the missing shards" if len(missing) == len(faults) else "download index and shards again",
            defect=_defect(missing, forgotten, len(faults)),
        )
    metadata = index.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    weights = _weights(files, name, spelling, metadata)
    return replace(weights, warnings=_size_warning(metadata, files))


def _defect(missing: Sequence[str], forgotten: Sequence[str], faults: int) -> str:
    """The id of the rule that explains all of the faults of an index."""
    if len(missing) == faults:
        return "index-missing-shards"
    return "index-stale-shards" if len(forgotten) == faults else "index-disagrees"


def _shards(weight_map: Mapping[str, str], folder: Path, index: str, spelling: Spelling) -> list[str]:
    """Names of the shards, all of which may be opened."""
    shards = sorted(set(weight_map.values()))
    faults = [f"{quoted(shard)} {fault}" for shard in shards if (fault := fault_of(shard, spelling.suffix)) is not None]
    if faults:
        raise InputError(
            f"{quoted(folder / index)} names {counted(len(faults), 'shard')} by what is no name of a file beside it",
            details=faults,
            hint="the index is damaged, or made to have other files read; do not trust this model",
            defect="paths-outside",
        )
    refuse_ways_out(shards, folder)
    return shards


def _is_sibling(name: str, totals: Set[tuple[str, ...]]) -> bool:
    """Whether `name` counts to one of the totals of the shards: model-00002-of-00005 beside model-00001-of-00005."""
    numbered = _NUMBERED.fullmatch(name)
    return numbered is not None and numbered.groups() in totals


def _weight_map(index: Mapping[str, object], path: Path) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{quoted(path)} has no weight_map, or an empty one", hint="download it again")
    if wrong := [name for name, shard in weight_map.items() if not isinstance(shard, str)]:
        raise FormatError(f"{quoted(path)} names no file for {len(wrong)} tensors, such as {quoted(wrong[0])}")
    return weight_map


def _misfits(weight_map: Mapping[str, str], files: Sequence[WeightFile], missing: Sequence[str]) -> list[str]:
    # A sound index, at no more than a look at each name.
    if sum(len(file.tensors) for file in files) == len(weight_map) and not missing:
        homes_of_all = {name: file.name for file in files for name in file.tensors}
        if homes_of_all == weight_map:
            return []
    homes: dict[str, list[str]] = {}
    for file in files:
        for name in file.tensors:
            homes.setdefault(name, []).append(file.name)
    faults = []
    for name, shards in homes.items():
        indexed_shard = weight_map.get(name)
        if len(shards) > 1:
            faults.append(f"{quoted(name)} is in {' and in '.join(quoted(shard) for shard in shards)}")
        elif indexed_shard is None:
            faults.append(f"{quoted(name)} is in {quoted(shards[0])}, and not in the index")
        elif indexed_shard != shards[0]:
            faults.append(f"{quoted(name)} is in {quoted(shards[0])}; the index says {quoted(indexed_shard)}")
    return faults + [
        f"{quoted(name)} is not in {quoted(shard)}, where the index says it is"
        for name, shard in weight_map.items()
        if name not in homes and shard not in missing
    ]


def _size_warning(metadata: Mapping[str, object], files: Sequence[WeightFile]) -> tuple[str, ...]:
    """Programs disagree on what the size counts where weights are tied, so that a wrong one is no fault."""
    declared = metadata.get("total_size")
    size = sum(tensor.nbytes for file in files for tensor in file.tensors.values())
    if isinstance(declared, (int, float)) and declared != size:
        return (f"the index says that the tensors have {declared:,} bytes; they have {size:,}",)
    return ()
