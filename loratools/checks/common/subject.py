"""One source as rules see it: what was opened, what was read of it, or why it could not be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.adapter import Adapter
from loratools.checks.common.measured import MeasuredModule
from loratools.errors import LoraToolsError
from loratools.formats.common.base import Base
from loratools.formats.common.source import AdapterSource
from loratools.matching import Matches, match
from loratools.naming.language.repeated_layers import stack_to_repeat, with_repeated_layers

if TYPE_CHECKING:
    from loratools.checkpoints import Checkpoint


@dataclass(frozen=True)
class Subject:
    """What rules look at.

    Attributes:
        path: Where it is.
        source: The opened adapter, headers only; None if it could not be opened, and of a checkpoint.
        adapter: What a format reads from it; None if none could.
        checkpoint: The opened model, where it is no adapter.
        error: Why it could not be opened or read; None if it could.
        base: What is known of the model that it is for, where a person has given one.
        program: The program that is to load it, where a person has named one.
        modules: What the values of each update say; None if they were not read.
        gains: For each module that was compared with the base, the share of its update that is left once the sum is
            rounded to the base's dtype; None if it was not computed.
        tensors: How many values of each other tensor are NaN or infinite; None if they were not read.
        twins: Other adapters of the same run with the same update, up to rounding.
        explained: Whether a rule has said already why it could not be read.
    """

    path: Path
    source: AdapterSource | None = None
    adapter: Adapter | None = None
    checkpoint: Checkpoint | None = None
    error: LoraToolsError | None = None
    base: Base | None = None
    program: str | None = None
    modules: Mapping[str, MeasuredModule] | None = None
    tensors: Mapping[str, int] | None = None
    gains: Mapping[str, float] | None = None
    twins: tuple[Path, ...] = field(default=())
    explained: bool = False

    @cached_property
    def config(self) -> Mapping[str, object]:
        """The fields of `adapter_config.json` where it is surely this adapter's; empty if there is none."""
        if self.source is None or self.source.config is None or not self.source.config_belongs_to_file:
            return {}
        return self.source.config

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The files that hold its tensors."""
        if self.source is not None:
            places = (tensor.location for tensor in self.source.tensors.values())
            return tuple(dict.fromkeys([self.source.file, *(p.file.path for p in places if p is not None)]))
        if self.checkpoint is not None:
            places = (tensor.location for tensor in self.checkpoint.stored.values())
            return tuple(dict.fromkeys(p.file.path for p in places if p is not None))
        return (self.path,) if self.path.is_file() else ()

    @cached_property
    def folder(self) -> Path:
        """The folder that it lies in."""
        if self.source is not None:
            return self.source.folder
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def fit(self) -> Matches | LoraToolsError | None:
        """Where the names of the adapter go in the base, or why that is not clear; None if no base has names."""
        base, adapter = self.base, self.adapter
        if adapter is None or base is None or not base.shapes:
            return None
        try:
            if adapter.layer_order:
                stack = stack_to_repeat(base.shapes, adapter.layer_order, base.name)
                base = replace(base, shapes=with_repeated_layers(base.shapes, stack, adapter.layer_order))
            return match(adapter, base.shapes, config=base.config)
        except LoraToolsError as error:
            return error
