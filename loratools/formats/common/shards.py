"""An adapter in several files, as transformers saves one that is larger than `max_shard_size`.

FOLDER/adapter_model-00001-of-00004.safetensors ...
FOLDER/model.safetensors.index.json, or adapter_model.safetensors.index.json   weight_map: tensor -> shard
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from loratools.errors import FormatError
from loratools.short_repr import counted
from loratools.storage.files import quoted

_SHARD = re.compile(r"adapter_model-(\d{5})-of-(\d{5})\.(safetensors|bin)")
_INDEXES = (
    "adapter_model.safetensors.index.json",
    "adapter_model.bin.index.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
_HINT = "save the adapter again, or copy all of its files: each holds other tensors"


def is_shard(name: str) -> bool:
    """Whether a file of this name is one part of an adapter."""
    return _SHARD.fullmatch(name) is not None


def shards_of(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files that make up the adapter in `folder`, in their order; none where it has no shards.

    Args:
        folder: The adapter's folder.
        names: Names of the files in it.

    Raises:
        FormatError: Some of the shards are missing, or there are those of two adapters.
    """
    shards = {name: shard for name in sorted(names) if (shard := _SHARD.fullmatch(name)) is not None}
    if not shards:
        return []
    kinds = {(shard[2], shard[3]) for shard in shards.values()}
    if len(kinds) > 1:
        raise FormatError(
            f"{quoted(folder)} holds shards of more than one adapter",
            details=list(shards),
            hint="remove the older ones",
            defect="index-stale-shards",
        )
    (count, suffix) = kinds.pop()
    # A count that is damaged could be of any size; as many are looked for as there may be names for.
    expected = [f"adapter_model-{number:05d}-of-{count}.{suffix}" for number in range(1, int(count) + 1)]
    if missing := [name for name in expected if name not in shards]:
        raise FormatError(
            f"{quoted(folder)} has {len(shards)} of the {int(count)} shards of its adapter",
            details=[f"{name} is missing" for name in missing[:20]],
            hint=_HINT,
            defect="index-missing-shards",
        )
    return [folder / name for name in expected if name in shards]


def require_indexed(folder: Path, tensors: Mapping[str, str]) -> None:
    """Raise FormatError where an index beside the shards speaks of other tensors than they hold.

    Args:
        folder: The adapter's folder.
        tensors: Name of each tensor, and of the file that holds it.
    """
    from loratools.storage.json_file import read_json

    for index in _INDEXES:
        if not (folder / index).is_file():
            continue
        listed = read_json(folder / index).get("weight_map")
        if not isinstance(listed, Mapping) or not any(is_shard(str(name)) for name in listed.values()):
            continue  # a whole model's, whose files are beside it
        faults = [f"{quoted(name)} is not in {quoted(str(file))}, as the index says" for name, file in listed.items()
                  if tensors.get(name) != file]  # fmt: skip
        faults += [f"{quoted(name)} is in no line of the index" for name in tensors if name not in listed]
        if faults:
            raise FormatError(
                f"{quoted(folder / index)} and the adapter's shards do not agree on {counted(len(faults), 'tensor')}",
                details=faults[:20],
                hint=_HINT,
                defect="index-disagrees",
            )
