"""The plan of a merge: every tensor of the result, where its values come from, and the other files of the output.

Built from headers and configs. Values are read only to compare two adapters that replace the same weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from loratools.adapter import Adapter
from loratools.checkpoints import Checkpoint, Component
from loratools.errors import MachineError
from loratools.matching import Leftover, Matches
from loratools.notebook_html import notebook_html
from loratools.ops.merge.chosen_rounding import feedback_memory
from loratools.ops.merge.config import merged_configs
from loratools.ops.merge.index_text import index_text
from loratools.ops.merge.into_gguf import (
    is_gguf,
    layout_of_gguf,
)
from loratools.ops.merge.options import MergeOptions
from loratools.ops.merge.outputs import CopyUnit, Output, OutputFile, PlannedFile, Requantised, RowsUnit, WorkUnit
from loratools.ops.merge.quantised import (
    is_dequantised,
    unpacking_memory,
    with_stored_parts,
)
from loratools.ops.merge.requantise import requantising_memory
from loratools.ops.merge.rounding import RoundingMode
from loratools.ops.merge.side_files import planned_side_files
from loratools.ops.merge.trained_on import TrainingScheme
from loratools.ops.merge.weights import merged_weights
from loratools.short_repr import one_line
from loratools.storage.files import free_space, quoted
from loratools.storage.safetensors_writer import TensorSpec, layout
from loratools.storage.streamed_file import FileLayout
from loratools.tensors.files import ByteRange

# A unit is the work that one worker does at a time: large enough to amortise handing it over, small enough to share one
# large tensor among workers.
_UNIT_BYTES = 32 << 20
# Measured: a process that has imported numpy, and the memory of a worker without its factors.
_PROCESS_BYTES = 40 << 20
_BLOCKS_BYTES = 8 << 20


@dataclass(frozen=True)
class MergePlan:
    """The plan of a merge, computed from headers.

    Attributes:
        base: The base as it is merged; if its weights are dequantised, a checkpoint of plain weights.
        adapters: The adapters, in the order given.
        weights: The weight of each adapter.
        matches: For each adapter, the places of its names in the base; empty for an adapter of weight 0.
        files: The weight files that will be written.
        side_files: The other files that will be written.
        added: Names of new weights, which the base does not have.
        warnings: Warnings about the result, as sentences.
        out: The path of the result.
        rounding: How sums are rounded to the stored dtype.
        one_file: Whether the result is one file and not a folder.
        trained_on: How the base was quantised in training, if the adapters are added to those dequantised values; else
            None.
        options: The options of the merge.

    Example:
        >>> import loratools
        >>> report = loratools.merge("fixtures/llama-tiny", "fixtures/llama-tiny-science", "merged-later", plan=True)
        >>> report.plan.bytes_written > 0, report.output is None
        (True, True)
    """

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    matches: tuple[Matches, ...]
    files: tuple[OutputFile, ...]
    side_files: tuple[PlannedFile, ...]
    added: tuple[str, ...]
    warnings: tuple[str, ...]
    out: Path
    rounding: RoundingMode = "nearest"
    one_file: bool = False
    trained_on: TrainingScheme | None = None
    options: MergeOptions = field(default_factory=MergeOptions)

    def __repr__(self) -> str:
        return one_line(self)

    _repr_html_ = notebook_html

    @property
    def active(self) -> list[tuple[Adapter, float]]:
        """The adapters with a weight other than 0, and their weights."""
        return [(a, w) for a, w in zip(self.adapters, self.weights, strict=True) if w]

    @property
    def requantized(self) -> tuple[Requantised, ...]:
        """The packed weights that are changed and quantised again."""
        return tuple(o.requantised for o in self.outputs if o.requantised is not None)

    @cached_property
    def outputs(self) -> tuple[Output, ...]:
        """All tensors of the result, in file order."""
        return tuple(o for f in self.files for o in f.outputs)

    @cached_property
    def dequantized(self) -> tuple[str, ...]:
        """The names of the quantised weights that are written as floats."""
        if not any(is_dequantised(weight) for weight in self.base.weights.values()):
            return ()
        return tuple(o.name for o in self.outputs if self._is_dequantized(o))

    @property
    def copied(self) -> int:
        """How many tensors are copied from the base, or only cast to another dtype."""
        dequantized = {*self.dequantized}
        return sum(1 for o in self.outputs if not o.touched and o.name not in dequantized)

    def _is_dequantized(self, output: Output) -> bool:
        if self.base.quantisation is not None and output.name in self.base.quantisation.weights:
            return False
        weight = self.base.weights.get(self.base.tied.get(output.name, output.name))
        return weight is not None and is_dequantised(weight)

    @property
    def leftovers(self) -> tuple[Leftover, ...]:
        """The names of the adapters that do not fit the base."""
        return tuple(leftover for m in self.matches for leftover in m.leftovers)

    @property
    def with_index(self) -> bool:
        """Whether the result has an index of its weight files."""
        return any(f.index is not None for f in self.files)

    @cached_property
    def layouts(self) -> tuple[FileLayout, ...]:
        """The header of each file, and where its tensors lie."""
        return tuple(file_layout(f) for f in self.files)

    @property
    def bytes_written(self) -> int:
        """The size of all weight files of the result, in bytes."""
        return sum(file.size for file in self.layouts)

    @property
    def memory(self) -> int:
        """An estimate of the peak memory of each worker process, in bytes."""
        merged = [o.merged for o in self.outputs]
        factors = max((sum(t.nbytes for u in o.updates for t in u.update.parts.values()) for o in merged), default=0)
        # A kind that needs its whole weight or whole delta holds them in float64: base, result and temporaries.
        largest_at_once = max((4 * 8 * math.prod(o.shape) for o in merged if o.needs_whole), default=0)
        feedback = max((feedback_memory(o) for o in merged), default=0)
        feedback += max((requantising_memory(r) for r in self.requantized), default=0)
        return _PROCESS_BYTES + _BLOCKS_BYTES + 4 * factors + largest_at_once + feedback + unpacking_memory(merged)

    def to_dict(self) -> dict[str, object]:
        """Return the document of `loratools merge --plan --json`, without the fields common to all verbs."""
        touched = [o.merged for o in self.outputs if o.touched]
        return {
            "plan": {
                "base": self.base.name,
                "adapters": [
                    {
                        "path": a.name,
                        "weight": w,
                        "format": a.format,
                        "renaming": str(m.renaming) if m.renaming else None,
                    }
                    for a, w, m in zip(self.adapters, self.weights, self.matches, strict=True)
                ],
                "matches": [
                    {
                        "adapter": i,
                        "target": target,
                        "weight": place.weight,
                        "part": str(place.at) or None,
                        "transposed": place.transposed,
                        "rank": self.adapters[i].updates[target].rank,
                        "scale": self.adapters[i].updates[target].scale,
                    }
                    for i, m in enumerate(self.matches)
                    for target, places in m.updates.items()
                    for place in places
                ],
                "leftovers": [{"name": skipped.name, "why": skipped.why} for skipped in self.leftovers],
                "targets": sum(1 for o in touched if o.updates),
                "replacements": [o.name for o in touched if o.replaced_by is not None],
                "added": list(self.added),
                "dequantized": list(self.dequantized),
                "requantized": [{"name": r.output.name, "scheme": r.scheme} for r in self.requantized],
                "rounding": self.rounding,
                "trained_on": str(self.trained_on) if self.trained_on is not None else None,
                "untouched": len(self.outputs) - len(touched),
                "files": [
                    {"name": f.name, "tensors": len(f.outputs), "bytes": file.size}
                    for f, file in zip(self.files, self.layouts, strict=True)
                ],
                "side_files": [
                    {"name": f.name, "from": f.origin if f.text is None else "written anew"} for f in self.side_files
                ],
                "not_copied": [{"name": skipped.name, "why": skipped.why} for skipped in self.base.left_out],
                "bytes": self.bytes_written,
                "memory": self.memory,
                "disk_free": free_space(self.out.parent),
                "warnings": list(self.warnings),
            },
            "output": str(self.out),
        }

    def require_space(self, out: Path) -> None:
        """Check that the disk has room for the result, before anything is written.

        Args:
            out: The path of the result.

        Raises:
            MachineError: The disk has too little free space. The error says how much is needed.
        """
        needed = self.bytes_written + sum(f.source.stat().st_size for f in self.side_files if f.source is not None)
        free = free_space(out.parent)
        if needed > free:
            raise MachineError(
                f"{needed:,} bytes are needed on the disk of {quoted(out)}, and {free:,} are free",
                hint="free some space, or write to another disk",
            )


def plan_merge(
    base: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    options: MergeOptions,
    *,
    out: Path,
) -> MergePlan:
    """Plan the merge of weighted adapters into `base`.

    Raises:
        UnsupportedError: An adapter would change a quantised weight, and neither dequantising nor requantising is
            requested.
        MismatchError: Part of an adapter does not fit the base (unless `allow_partial`), or two adapters contradict
            each other.
    """
    merged = merged_weights(base, adapters, options)
    base, active = merged.base, [adapter for adapter, weight in adapters if weight]
    outputs = with_stored_parts(base, merged.outputs, retype=options.retype)
    files = _files(base, outputs, options.max_shard_bytes)
    shapes = {name: output.shape for name, output in merged.shaped.items()}
    configs, config_warnings = ({}, []) if is_gguf(base) else merged_configs(
        base, active, shapes, dtype=options.stored_dtype, dequantize=options.dequantize, untied=merged.untied,
        deeper=merged.deeper,
    )  # fmt: skip
    side_files, side_warnings = planned_side_files(base, active, configs)
    return MergePlan(
        base,
        tuple(a for a, _ in adapters),
        tuple(w for _, w in adapters),
        merged.matches,
        files,
        side_files,
        merged.added,
        tuple(dict.fromkeys([*merged.warnings, *config_warnings, *merged.rounding_warnings, *side_warnings])),
        out,
        options.rounding,
        trained_on=merged.scheme,
        options=options,
    )


def specs(file: OutputFile) -> list[TensorSpec]:
    return [TensorSpec(name, o.dtype, o.shape) for name, o in zip(file.stored_names, file.outputs, strict=True)]


def file_layout(file: OutputFile) -> FileLayout:
    """The header of a file, and where its tensors lie."""
    return layout_of_gguf(file) if file.gguf is not None else layout(specs(file), file.metadata)


def work_units(plan: MergePlan) -> list[WorkUnit]:
    """All bytes of every output file, each in exactly one unit, in file order."""
    units: list[WorkUnit] = []
    for i, (file, file_layout) in enumerate(zip(plan.files, plan.layouts, strict=True)):
        # What is copied from one place after the other to one place after the other is copied together, whatever
        # tensors it is of: most of a model of 45,000 tensors, where an adapter is of the attention alone.
        run: list[ByteRange] = []
        target = end = 0
        for name, output in zip(file.stored_names, file.outputs, strict=True):
            source, offset = output.copied, file_layout.offsets[name]
            if source is not None and run and offset == end and _follows(run[-1], source):
                run.append(source)
                end += source.nbytes
                continue
            units += _copy_units(i, run, target)
            run = []
            if source is None:
                units += rows_units(i, output)
            elif source.nbytes:
                run, target, end = [source], offset, offset + source.nbytes
        units += _copy_units(i, run, target)
    return units


def rows_units(file: int, output: Output) -> list[RowsUnit]:
    """The units in which an output is computed, `file` being the number of its file."""
    rows = output.rows
    step = rows if output.in_one_piece else max(1, _UNIT_BYTES // max(1, output.row_bytes))
    return [RowsUnit(file, output, start, min(start + step, rows)) for start in range(0, rows, max(1, step))]


def _follows(first: ByteRange, second: ByteRange) -> bool:
    return first.offset + first.nbytes == second.offset and first.file == second.file


def _copy_units(file: int, run: Sequence[ByteRange], target: int) -> list[CopyUnit]:
    """The units in which ranges that follow each other are copied to `target`."""
    if not run:
        return []
    first, last = run[0], run[-1]
    begin, end = first.offset, last.offset + last.nbytes
    return [
        CopyUnit(file, ByteRange(first.file, start, min(_UNIT_BYTES, end - start)), target + start - begin)
        for start in range(begin, end, _UNIT_BYTES)
    ]


def _files(base: Checkpoint, outputs: Mapping[str, Output], max_shard_bytes: int | None) -> tuple[OutputFile, ...]:
    """The files of the base, with new tensors at the end of the last one; or files of at most `max_shard_bytes`.

    Each component of the base has files of its own.
    """
    files: list[OutputFile] = []
    for component in base.components:
        in_component = [o for name, o in outputs.items() if _component_of(name, base) is component]
        cut = (
            _files_as_stored(component, in_component)
            if max_shard_bytes is None
            else _cut_files(component, in_component, max_shard_bytes)
        )
        files += cut
    return tuple(files)


def _component_of(name: str, base: Checkpoint) -> Component:
    """The component whose prefix the name has. A name without a prefix belongs to the first component."""
    return next((c for c in base.components if c.prefix and name.startswith(c.prefix)), base.components[0])


def _files_as_stored(component: Component, outputs: Sequence[Output]) -> list[OutputFile]:
    """The tensors in the component's order, with new ones at the end of the last file."""
    unassigned = {o.name: o for o in outputs}
    groups = [
        [unassigned.pop(component.prefix + n) for n in f.tensors if component.prefix + n in unassigned]
        for f in component.files
    ]
    groups[-1] += unassigned.values()
    index = component.index_name if component.index is not None else None
    return [
        OutputFile(f.saved_as, dict(f.metadata), tuple(group), component.prefix, index, f.gguf)
        for f, group in zip(component.files, groups, strict=True)
    ]


def _cut_files(component: Component, outputs: Sequence[Output], max_shard_bytes: int) -> list[OutputFile]:
    groups: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        if groups[-1] and filled + output.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(output)
        filled += output.nbytes
    metadata = dict(component.files[0].metadata) or {"format": "pt"}
    stem, count = component.folder + component.stem, len(groups)
    if count == 1:
        return [OutputFile(f"{stem}.safetensors", metadata, tuple(groups[0]), component.prefix)]
    return [
        OutputFile(
            f"{stem}-{i:05d}-of-{count:05d}.safetensors", metadata, tuple(g), component.prefix, component.index_name
        )
        for i, g in enumerate(groups, 1)
    ]


def index_names(plan: MergePlan) -> list[str]:
    """The names of the indexes of the result."""
    used = {file.index for file in plan.files}
    return [component.index_name for component in plan.base.components if component.index_name in used]


def index_texts(plan: MergePlan) -> dict[str, str]:
    """The indexes of the result, as a mapping of file name to text."""
    texts: dict[str, str] = {}
    for component in plan.base.components:
        files = [f for f in plan.files if f.index == component.index_name]
        if not files:
            continue
        outputs = [o for f in files for o in f.outputs]
        metadata = dict(component.index or {})
        metadata["total_size"] = sum(o.nbytes for o in outputs)
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(math.prod(o.shape) for o in outputs)
        weight_map = {name: f.name.removeprefix(component.folder) for f in files for name in f.stored_names}
        texts[component.index_name] = index_text(metadata, dict(sorted(weight_map.items())))
    return texts
