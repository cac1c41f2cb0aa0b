"""Roundings of loratools that depend on more than one value, tried by doing them again: bit by bit, or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from loratools.ops.merge.outputs import Output, Requantised, RowsUnit
from loratools.ops.merge.requantise import requantise
from loratools.ops.merge.rounding import NEAREST, Rounding, default_penalty
from loratools.ops.merge.rows import Gain, merge_rows
from loratools.ops.verify.cause import Cause
from loratools.ops.verify.diagnosis import (
    MAGNITUDE_DROPPED,
    TRANSPOSED,
    candidate_weights,
    flipped,
    plain_lora,
)
from loratools.ops.verify.packed import grid_name, same_grid
from loratools.quantization.common.protocol import PackedWeight
from loratools.storage.files import read_back, read_into
from loratools.tensors.lazy import LazyTensor

_PIECE = 1 << 20


@dataclass(frozen=True)
class Replay:
    """A rounding that loratools may have used."""

    rounding: Rounding

    def __str__(self) -> str:
        return f"deltas in float32, loratools with {_option(self.rounding)}"


def _option(rounding: Rounding) -> str:
    setting = f"seed {rounding.seed}" if rounding.mode == "stochastic" else f"penalty {rounding.penalty:g}"
    return f"--rounding {rounding.mode} ({setting})"


def possible_replays(output: Output, *, recorded: bool, packed: bool = False) -> tuple[Replay, ...]:
    """The roundings to try for one weight: the planned one, and without a record those with the usual settings.

    Args:
        output: The weight, with the rounding that its record, or the caller, says.
        recorded: Whether the merged model has a record, which says how it was rounded.
        packed: Whether the weight is quantised again.
    """
    planned = (Replay(output.rounding),) if output.rounding != NEAREST or packed else ()
    if recorded:
        return planned
    penalty = default_penalty("adapter", packed=packed)
    usual = (Replay(Rounding("stochastic")), Replay(Rounding("adapter", penalty=penalty)))
    return (*planned, *(replay for replay in usual if replay not in planned))


def gives(replay: Replay, output: Output, merged: LazyTensor) -> bool:
    """Whether a merge of `output` with that rounding gives the bytes of `merged`."""
    if merged.location is None or output.dtype not in ("BF16", "F16"):
        return False
    rewritten = replace(output, rounding=replay.rounding)
    return _writes_the_same(RowsUnit(0, rewritten, 0, rewritten.rows), merge_rows, merged)


def requantised_recipe(requantised: Output, merged: PackedWeight, *, recorded: bool) -> str | None:
    """The recipe of a merge that quantised a weight again, where one gives its bytes; None if none does.

    Args:
        requantised: The packed numbers as a merge with --requantize plans them.
        merged: The weight of the merged model.
        recorded: Whether the merged model has a record, which says how it was rounded.
    """
    planned = requantised.requantised
    assert planned is not None, "only such outputs are given"
    if not same_grid(planned.weight, merged):
        return None
    for replay in possible_replays(planned.output, recorded=recorded, packed=True):
        output = replace(planned.output, rounding=replay.rounding)
        if _requantises_to(requantised, replace(planned, output=output), merged):
            option = f"--requantize {merged.parameters.format.lower()}" if planned.retyped else "--requantize"
            option = option if replay.rounding.mode == "nearest" else f"{option} {_option(replay.rounding)}"
            scales = "with new scales" if planned.retyped else "onto the grid"
            return f"deltas in float32, loratools with {option} {scales} of {grid_name(merged)}"
    return None


def replayed_cause(requantised: Output, merged: PackedWeight, names: Sequence[str]) -> Cause | None:
    """What is wrong with a weight that got another type, where doing it again with the defect gives its bytes.

    None if no defect does, or if the weight keeps its scales: the values show defects in that case.
    """
    planned = requantised.requantised
    if planned is None or not planned.retyped:
        return None
    output = planned.output
    for times, cause in candidate_weights(output, names):
        if _requantises_to(requantised, replace(planned, output=_multiplied(output, times)), merged):
            return cause
    for defective, cause in ((plain_lora(output), MAGNITUDE_DROPPED), (flipped(output), TRANSPOSED)):
        if defective is not None and _requantises_to(requantised, replace(planned, output=defective), merged):
            return cause
    return None


def _multiplied(output: Output, times: Sequence[float]) -> Output:
    """The output with the weight of each adapter that changes it multiplied."""
    factors = dict(zip(sorted({update.adapter for update in output.updates}), times, strict=True))
    return replace(output, updates=tuple(replace(u, weight=u.weight * factors[u.adapter]) for u in output.updates))


def _requantises_to(requantised: Output, planned: Requantised, merged: PackedWeight) -> bool:
    """Whether writing the packed numbers as planned gives the bytes of the merged model."""
    rewritten = replace(requantised, requantised=planned)
    return _writes_the_same(RowsUnit(0, rewritten, 0, rewritten.rows), requantise, merged.parts[0].tensor)


def _writes_the_same(unit: RowsUnit, write: Callable[[RowsUnit, int, int], Gain], merged: LazyTensor) -> bool:
    """Whether doing a unit of a merge again gives the bytes of `merged`."""
    location = merged.location
    if location is None or unit.output.nbytes != location.nbytes:
        return False
    with tempfile.TemporaryFile(buffering=0) as file:
        write(unit, file.fileno(), 0)
        for start in range(0, location.nbytes, _PIECE):
            size = min(_PIECE, location.nbytes - start)
            rewritten, stored = bytearray(size), bytearray(size)
            read_back(file.fileno(), memoryview(rewritten), start)
            read_into(location, start, stored)
            if rewritten != stored:
                return False
    return True
