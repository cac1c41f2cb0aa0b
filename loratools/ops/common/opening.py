"""How a verb that writes an adapter begins and ends: its adapters opened, its output checked, and the result saved.

Modules of image models keep the names of their files where the result is written with the same names: nothing is
renamed then, and what the file keeps fused is treated as one module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratools import formats
from loratools.adapter import Adapter
from loratools.formats import Base
from loratools.formats.common.leave_out import LeaveOut
from loratools.formats.common.opened_base import known_base
from loratools.ops.card.adapter_card import AdapterCard
from loratools.ops.common.arguments import AdapterArgument, RankFrom, Reading, load_weighted
from loratools.ops.common.output import format_that_holds, output_format, share_names
from loratools.storage.commit import check_output
from loratools.storage.held_inputs import holding_inputs
from loratools.updates.lora_experts import Packing

if TYPE_CHECKING:
    from loratools.checkpoints import Checkpoint


@dataclass(frozen=True)
class AdapterOutput:
    """Where the adapter that a verb makes is written, and how.

    Attributes:
        path: The file or folder; nothing is written if None.
        format: The format to write, one of `list_formats()`.
        overwrite: Whether an output that loratools wrote may be replaced.
        inputs: What the output must not be, hold or lie in.
        base: What is known of the model that the adapter is for.
        requested: Whether a person has asked for the format, so that no other is written in its place.
    """

    path: Path | None
    format: str
    overwrite: bool
    inputs: tuple[Path, ...]
    base: Base | None
    requested: bool = True

    @property
    def named_path(self) -> Path | None:
        """The path, once its name is known to suit the format; raises the same errors as `formats.named`."""
        return None if self.path is None else formats.named(self.path, self.format)

    def check(self) -> None:
        """Refuse, before any work, an output that may not be written; raises the same errors as `check_output`."""
        if (path := self.named_path) is not None:
            check_output(path, overwrite=self.overwrite, inputs=self.inputs)

    def save(self, adapter: Adapter, *, plan: bool = False, card: AdapterCard | None = None) -> list[str]:
        """Write the adapter, and return warnings; of a plan, only refuse what the format cannot hold.

        Args:
            adapter: The adapter.
            plan: Whether nothing is written.
            card: The model card to write beside it, where the output is a folder.
        """
        if self.path is None and not plan:
            return []
        holding = format_that_holds(adapter, self.path, self.format, base=self.base, requested=self.requested)
        if plan or self.path is None:
            formats.ensure_writable(adapter, holding.name, base=self.base)
            return list(holding.warnings)
        with (
            holding_inputs(),
            formats.staged(
                adapter,
                self.path,
                format=holding.name,
                overwrite=self.overwrite,
                inputs=self.inputs,
                base=self.base,
            ) as written,
        ):
            if card is not None:
                card.write(written.path, self.path, holding.name, sorted({u.kind for u in adapter.updates.values()}))
            warnings = written.warnings
        return [*holding.warnings, *warnings]


@dataclass(frozen=True)
class OpenedAdapters:
    """The adapters of a verb, each with its weight, and the output that is made of them.

    `warnings` say how the format of the output was chosen.
    """

    weighted: tuple[tuple[Adapter, float], ...]
    output: AdapterOutput
    warnings: tuple[str, ...]


def open_adapters(
    arguments: Sequence[AdapterArgument],
    out: str | Path | None,
    *,
    format: str | None,
    base: str | Path | Checkpoint | Base | None,
    rank_from: RankFrom,
    expert_packing: Packing | None,
    from_format: str | None,
    overwrite: bool,
    leave_out: LeaveOut,
) -> OpenedAdapters:
    """Load adapters that one is made of, and decide how that one is written. Arguments as those of the verbs.

    leave_out: tensors that are no reason to refuse an adapter.

    Raises:
        UsageError: There is none, a weight is not finite, all are 0, or the format is not written.
        LoraToolsError: What `formats.load` and `known_base` raise.
    """
    known = known_base(base)
    reading = Reading(rank_from=rank_from, expert_packing=expert_packing, from_format=from_format, leave_out=leave_out)
    weighted = load_weighted(arguments, replace(reading, base=known))
    chosen = output_format([adapter for adapter, weight in weighted if weight], out, format)
    if out is not None and keep_stored_names([adapter for adapter, _ in weighted], chosen.name, known):
        as_stored = load_weighted(arguments, replace(reading, stored_names=True))
        if share_names([adapter for adapter, _ in as_stored]):
            weighted = as_stored
    output = AdapterOutput(
        path=Path(out) if out is not None else None,
        format=chosen.name,
        overwrite=overwrite,
        inputs=tuple(adapter.path for adapter, _ in weighted if adapter.path is not None),
        base=known,
        requested=format is not None,
    )
    return OpenedAdapters(tuple(weighted), output, chosen.warnings)


def keep_stored_names(adapters: Sequence[Adapter], format: str, base: Base | None) -> bool:
    """Whether modules keep the names of their files: all are written in their own format, and no base has others."""
    return base is None and formats.keeps_names(format) and all(adapter.format == format for adapter in adapters)
