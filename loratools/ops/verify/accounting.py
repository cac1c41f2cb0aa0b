"""Which weight of a merged model is held against what: every name on either side is met, missing or unexplained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from loratools.checkpoints import Checkpoint
from loratools.checkpoints.common.side_files import STRAY_SHARD
from loratools.errors import MismatchError
from loratools.ops.merge.outputs import Output
from loratools.ops.merge.plan import MergePlan
from loratools.ops.verify.packed import measure_packed, packed_weight, same_packed
from loratools.ops.verify.recipes import round_to
from loratools.storage.arrays import read_array
from loratools.storage.files import quoted, read_whole
from loratools.storage.same import same_bytes
from loratools.tensors.dtypes import FLOAT_DTYPES
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.views import reshaped

Untouched: TypeAlias = Literal["same", "cast", "different"]
_BLOCK_ELEMENTS = 1 << 18
# Fields of a config that say who wrote it and not what the model is.
_WRITER = frozenset({"transformers_version", "_name_or_path", "_diffusers_version"})
_SHOWN_VALUE = 60


@dataclass(frozen=True)
class Pair:
    """A weight as it should be, and as the merged model has it.

    Attributes:
        output: What a merge would store.
        merged: What is stored.
        follows: The weight that it follows in the merged model, where it should be stored on its own.
    """

    output: Output
    merged: LazyTensor
    follows: str | None = None


@dataclass(frozen=True)
class Accounts:
    """All names of both sides.

    Attributes:
        pairs: Weights to be compared, in the order of the plan.
        missing: Names that the merged model should have and has not.
        unexplained: Names that only the merged model has.
    """

    pairs: tuple[Pair, ...]
    missing: tuple[str, ...]
    unexplained: tuple[str, ...]


def accounts(plan: MergePlan, merged: Checkpoint) -> Accounts:
    """Pair the weights of a planned merge with those of a model.

    Raises:
        MismatchError: The two share no name.
    """
    expected = {output.name: _as_weight(output, plan.base) for output in plan.outputs}
    if not expected.keys() & merged.weights.keys():
        raise MismatchError(
            f"{quoted(merged.path)} has none of the weights of {quoted(plan.base.path)}",
            details=[f"merged   {name}" for name in list(merged.weights)[:3]]
            + [f"base     {name}" for name in list(expected)[:3]],
            hint="give the base that it was merged from, in the layout that it was merged in",
        )
    pairs: list[Pair] = []
    missing: list[str] = []
    for name, output in expected.items():
        followed = merged.tied.get(name)
        if name in merged.weights:
            pairs.append(Pair(output, merged.weights[name]))
        elif followed is not None:
            pairs.append(Pair(output, merged.weights[followed], followed))
        else:
            missing.append(name)
    unexplained: list[str] = []
    for name in merged.weights.keys() - expected.keys():
        source = plan.base.tied.get(name)
        if source is not None and source in expected:
            # Stored a second time, under the name that is tied to it.
            pairs.append(Pair(replace(expected[source], name=name), merged.weights[name]))
        else:
            unexplained.append(name)
    return Accounts(tuple(pairs), tuple(missing), tuple(sorted(unexplained)))


def _as_weight(output: Output, base: Checkpoint) -> Output:
    """The output as the model computes with it: in a GGUF file the packed numbers of a weight bear its own name."""
    packed = base.quantisation.weights.get(output.name) if base.quantisation is not None else None
    if packed is None or output.touched:
        return output
    return replace(output, dtype=packed.dtype, shape=packed.shape, values=base.weights[output.name])


def compare_untouched(output: Output, merged: LazyTensor) -> Untouched:
    """Compare a weight that nothing is added to: the bytes, and else the values rounded to the merged dtype.

    A weight whose rows are replaced, or that is replaced as a whole, is compared by its values. One that the merged
    model stores quantised is the same where its parts are those of the base; where each value is the nearest one of its
    grid, it counts as cast.
    """
    if (packed := packed_weight(merged)) is not None:
        base = packed_weight(output.values)
        if base is not None and not output.patches and same_packed(base, packed):
            return "same"
        measured = measure_packed(output, packed) if output.shape == merged.shape else None
        if base is None and measured is not None:
            return "cast" if measured.nearest else "different"
    if not output.patches and same_bytes(output.values, merged):
        return "same"
    if output.shape != merged.shape or not {output.values.dtype, merged.dtype} <= set(FLOAT_DTYPES):
        return "different"
    from numpy import isfinite

    from loratools.ops.merge.rows import read_rows

    wide = "F64" if "F64" in (output.values.dtype, merged.dtype) else "F32"
    stored = reshaped(merged, output.matrix)
    step = max(1, _BLOCK_ELEMENTS // max(1, output.columns))
    for start in range(0, output.rows, step):
        stop = min(start + step, output.rows)
        exact = read_rows(output, wide, start, stop)
        rounded = round_to(exact, merged.dtype)
        # What is too large for the dtype is no number there.
        if bool((isfinite(exact) & ~isfinite(rounded)).any()):
            return "different"
        values = read_array(stored, wide, start, stop)
        # Not equal to itself: no number on either side is the same on both.
        if not bool(((rounded == values) | ((rounded != rounded) & (values != values))).all()):
            return "different"
    return "same" if output.values.dtype == merged.dtype else "cast"


def config_changes(base: Checkpoint, merged: Checkpoint) -> tuple[str, ...]:
    """Fields of the config that differ, as `field: base -> merged`."""
    return tuple(
        f"{key}: {_shown(base.config, key)} -> {_shown(merged.config, key)}"
        for key in sorted(base.config.keys() | merged.config.keys())
        if key not in _WRITER and base.config.get(key) != merged.config.get(key)
    )


def _shown(config: Mapping[str, object], key: str) -> str:
    if key not in config:
        return "absent"
    text = json.dumps(config[key], default=str)
    return text if len(text) <= _SHOWN_VALUE else f"{text[:_SHOWN_VALUE]}..."


def file_changes(plan: MergePlan, merged: Checkpoint) -> tuple[str, ...]:
    """Files beside the weights that differ from those of the merge that was planned, and those that are absent."""
    path_of = {file.name: file.path for file in merged.side_files}
    changes: list[str] = []
    for file in plan.side_files:
        # A config is compared field by field, and a model card may differ freely.
        if file.source is None or file.name.endswith(".md") or file.name == merged.config_file:
            continue
        if file.name not in path_of:
            changes.append(f"{file.name} is absent")
        elif not _same_file(file.source, path_of[file.name]):
            changes.append(f"{file.name} differs")
    return tuple(changes)


def _same_file(first: Path, second: Path) -> bool:
    return first.stat().st_size == second.stat().st_size and read_whole(first) == read_whole(second)


def stray_shards(merged: Checkpoint) -> tuple[str, ...]:
    """Files of weights in the folder that its index does not name."""
    return tuple(skipped.name for skipped in merged.left_out if skipped.why == STRAY_SHARD)
