"""Roundings of loratools that depend on more than one value, tried by doing them again: bit by bit, or not at all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from loratools.ops.merge.outputs import Output, RowsUnit
from loratools.ops.merge.rounding import Rounding, default_penalty
from loratools.ops.merge.rows import merge_rows
from loratools.storage.files import read_back, read_into
from loratools.storage.ownership import RECORD
from loratools.tensors.lazy import LazyTensor

_PIECE = 1 << 20
# A record is a few kilobytes for each adapter and file.
_LARGEST_RECORD = 16 << 20


@dataclass(frozen=True)
class Replay:
    """A rounding that loratools may have used."""

    rounding: Rounding

    def __str__(self) -> str:
        mode = self.rounding.mode
        how = f"seed {self.rounding.seed}" if mode == "stochastic" else f"penalty {self.rounding.penalty:g}"
        return f"deltas in float32, loratools with --rounding {mode} ({how})"


def possible_replays(folder: Path) -> tuple[Replay, ...]:
    """The roundings to try: the one that the record in `folder` tells, and else those with the usual settings.

    Rounding by measured moments is not among them, since the moments are not beside the model.
    """
    record = _record(folder)
    result = record.get("result")
    mode = result.get("rounding") if isinstance(result, Mapping) else None
    seed, penalty = record.get("seed"), record.get("penalty")
    known = Rounding("stochastic", seed=seed if isinstance(seed, int) else 0)
    fed_back = Rounding("adapter", penalty=penalty if isinstance(penalty, float) else default_penalty("adapter"))
    if mode == "stochastic":
        return (Replay(known),)
    if mode == "adapter":
        return (Replay(fed_back),)
    return () if mode is not None else (Replay(known), Replay(fed_back))


def _record(folder: Path) -> Mapping[str, object]:
    """What loratools wrote beside the model; empty where there is nothing that can be read."""
    path = folder / RECORD
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_RECORD:
            return {}
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, Mapping) and document.get("verb") == "merge" else {}


def gives(replay: Replay, output: Output, merged: LazyTensor) -> bool:
    """Whether a merge of `output` with that rounding gives the bytes of `merged`."""
    location = merged.location
    if location is None or output.dtype not in ("BF16", "F16"):
        return False
    again = replace(output, rounding=replay.rounding)
    with tempfile.TemporaryFile(buffering=0) as file:
        merge_rows(RowsUnit(0, again, 0, again.rows), file.fileno(), 0)
        for start in range(0, location.nbytes, _PIECE):
            size = min(_PIECE, location.nbytes - start)
            ours, theirs = bytearray(size), bytearray(size)
            read_back(file.fileno(), memoryview(ours), start)
            read_into(location, start, theirs)
            if ours != theirs:
                return False
    return True
