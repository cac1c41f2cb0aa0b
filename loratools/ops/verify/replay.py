"""Roundings of loratools that depend on more than one value, tried by doing them again: bit by bit, or not at all."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from loratools.ops.merge.outputs import Output, RowsUnit
from loratools.ops.merge.provenance import recorded_inputs
from loratools.ops.merge.rounding import Rounding, default_penalty
from loratools.ops.merge.rows import merge_rows
from loratools.storage.files import read_back, read_into
from loratools.tensors.lazy import LazyTensor

_PIECE = 1 << 20


@dataclass(frozen=True)
class Replay:
    """A rounding that loratools may have used."""

    rounding: Rounding

    def __str__(self) -> str:
        mode = self.rounding.mode
        how = f"seed {self.rounding.seed}" if mode == "stochastic" else f"penalty {self.rounding.penalty:g}"
        return f"deltas in float32, loratools with --rounding {mode} ({how})"


def possible_replays(path: Path) -> tuple[Replay, ...]:
    """The roundings to try: the one that the record of the model at `path` tells, else those with the usual settings.

    Rounding by measured moments is not among them, since the moments are not beside the model.
    """
    record = recorded_inputs(path)
    seed, penalty = record.get("seed"), record.get("penalty")
    stochastic = Rounding("stochastic", seed=seed if isinstance(seed, int) else 0)
    adapter = Rounding("adapter", penalty=penalty if isinstance(penalty, float) else default_penalty("adapter"))
    # A merge that rounds to nearest has no settings to record, and is told without them.
    recorded_mode = record.get("rounding")
    return tuple(Replay(r) for r in (stochastic, adapter) if recorded_mode in (None, r.mode))


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
