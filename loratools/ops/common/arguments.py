"""Arguments as the verbs take them: an adapter by path or loaded, perhaps with a weight; a dtype in any spelling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from loratools import formats
from loratools.adapter import Adapter
from loratools.errors import UnsupportedError, UsageError
from loratools.formats import Base
from loratools.formats.common.expert_layout import with_expert_layout
from loratools.formats.common.leave_out import NOTHING, LeaveOut
from loratools.formats.common.opened_base import known_base
from loratools.formats.common.sam_blocks import with_same_blocks
from loratools.formats.common.source import open_source
from loratools.ops.common.alpha import with_alpha
from loratools.updates.lora_experts import Orientation, Packing

AdapterSource: TypeAlias = str | Path | Adapter
AdapterArgument: TypeAlias = AdapterSource | tuple[AdapterSource, float]
RankFrom: TypeAlias = formats.RankFrom | None


@dataclass(frozen=True)
class Reading:
    """What a person says of adapters that are loaded, and what the verb does with them.

    Attributes:
        rank_from: Which rank makes the scale, where tensors and config disagree.
        from_format: The format, where it must not be found from the content.
        moved: Whether an adapter may belong to a base that its initialisation has changed.
        base: What is known of the model they are for; some formats need its names and sizes.
        stored_names: Whether modules of image models keep the names of the file.
        expert_packing: How fused experts share the columns of B.
        expert_orientation: How square fused experts are stored.
        alpha: The alpha of training, where the files do not say it.
        leave_out: Tensors that are no reason to refuse an adapter.
    """

    rank_from: RankFrom = None
    from_format: str | None = None
    moved: bool = False
    base: Base | None = None
    stored_names: bool = False
    expert_packing: Packing | None = None
    expert_orientation: Orientation | None = None
    alpha: float | None = None
    leave_out: LeaveOut = NOTHING


def load_adapter(source: AdapterSource, reading: Reading) -> Adapter:
    """Load one adapter, with a scale that is certain.

    Raises:
        UnsupportedError: Its initialisation changed the base, and the verb cannot subtract that.
        UndecidedError: Its experts may be packed in two ways, and nobody says how.
        LoraToolsError: What `formats.load` raises.
    """
    ((adapter, _),) = load_weighted([source], reading)
    return adapter


def load_weighted(
    arguments: Sequence[AdapterArgument] | AdapterSource, reading: Reading
) -> list[tuple[Adapter, float]]:
    """Load every adapter with its weight, 1 if none is given; a single adapter need not be in a list.

    Raises:
        UsageError: There is none, a weight is not finite, or all are 0.
        LoraToolsError: What `load_adapter` raises.
    """
    if isinstance(arguments, (str, Path, Adapter)):
        arguments = [arguments]
    if not arguments:
        raise UsageError("no adapter is given")
    pairs = [a if isinstance(a, tuple) else (a, 1.0) for a in arguments]
    for source, weight in pairs:
        if source == "":
            raise UsageError("the path of an adapter is empty", hint="give a path; '.' is the folder here")
        if not math.isfinite(weight):
            name = source.name if isinstance(source, Adapter) else source
            raise UsageError(f"the weight of '{name}' is {weight}, which is not finite")
    if not any(weight for _, weight in pairs):
        raise UsageError("every adapter has weight 0, so there is nothing to do")
    loaded = [_loaded(source, reading) for source, _ in pairs]
    loaded = with_expert_layout(loaded, packing=reading.expert_packing, orientation=reading.expert_orientation)
    loaded = [with_alpha(adapter, reading.alpha) for adapter in loaded]
    loaded = with_same_blocks(loaded)
    for adapter in loaded:
        _require_usable(adapter, reading.moved)
    return [(adapter, float(weight)) for adapter, (_, weight) in zip(loaded, pairs, strict=True)]


def _loaded(source: AdapterSource, reading: Reading) -> Adapter:
    if isinstance(source, Adapter):
        return source
    opened = replace(
        open_source(source, base=known_base(reading.base)),
        stored_names=reading.stored_names,
        leave_out=reading.leave_out,
    )
    return formats.load_source(opened, format=reading.from_format, rank_from=reading.rank_from)


def _require_usable(adapter: Adapter, moved: bool) -> None:
    adapter.require_certain()
    if adapter.initialisation_changed_base is not None and not moved:
        raise UnsupportedError(
            f"'{adapter.name}' was initialised with {adapter.initialisation_changed_base}, which changed the base: "
            "its factors alone are not the change",
            hint="merge subtracts the adapter as it was before training: --initial PATH",
        )
