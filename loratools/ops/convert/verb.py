"""convert: write an adapter in another format, read it back, compare, and only then move it into place.

Nothing is lost silently. What the target format cannot hold is an error that names it, or is listed if `allow_partial`
is set. Metadata of the source is listed as kept, recomputed or dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loratools import formats
from loratools.adapter import Adapter
from loratools.arguments import Globs, checked
from loratools.checkpoints import Checkpoint
from loratools.errors import LoraToolsError, MachineError, UnsupportedError, UsageError
from loratools.formats import Base
from loratools.formats.common.edited_metadata import EditedMetadata
from loratools.formats.common.leave_out import LeaveOut
from loratools.formats.common.notes import records_of
from loratools.formats.common.opened_base import known_base
from loratools.formats.common.source import counted, shown
from loratools.ops.card.adapter_card import AdapterCard
from loratools.ops.card.inputs import card_input
from loratools.ops.common.abandoned import abandoned_warnings, resumed_remarks
from loratools.ops.common.alpha import assumed_alpha_warnings
from loratools.ops.common.arguments import RankFrom, Reading, load_adapter
from loratools.ops.common.fetching import fetch_values
from loratools.ops.common.finite import refuse_not_finite
from loratools.ops.common.opening import keep_stored_names
from loratools.ops.common.result_options import result_options
from loratools.ops.common.resumable_work import is_worth_keeping
from loratools.ops.common.run_plans import adapters_plan
from loratools.ops.convert.compared import ComparedModules
from loratools.ops.convert.report import ConvertReport
from loratools.ops.convert.rewritten import Rewritten, rewritten
from loratools.ops.convert.serve import served
from loratools.ops.convert.verify import ConvertedModule, compare
from loratools.skipped import EXCLUDED, Skipped
from loratools.storage.casting import stored_dtype
from loratools.storage.commit import check_output
from loratools.storage.files import quoted
from loratools.storage.held_inputs import holding_inputs
from loratools.storage.resumption import Resumable
from loratools.tensors.dtypes import DTYPE_BITS, FLOAT_DTYPES
from loratools.updates.lora_experts import Orientation, Packing


@checked
@holding_inputs()
def convert(
    adapter: str | Path | Adapter,
    out: str | Path,
    *,
    format: str,
    base: str | Path | Checkpoint | Base | None = None,
    dtype: str | None = None,
    allow_partial: bool = False,
    alpha: float | None = None,
    serve: str | None = None,
    include: Globs = (),
    exclude: Globs = (),
    from_format: str | None = None,
    rank_from: RankFrom = None,
    expert_packing: Packing | None = None,
    expert_orientation: Orientation | None = None,
    set_metadata: Mapping[str, str] | None = None,
    strip_metadata: bool = False,
    overwrite: bool = False,
    card: bool = True,
    plan: bool = False,
    resume: bool = False,
) -> ConvertReport:
    """Write an adapter in another format, and verify that the result has the same deltas before it is kept.

    Args:
        adapter: The adapter: a path or a loaded adapter.
        out: The folder or file to write, depending on the format.
        format: The format to write, one of `list_formats()`.
        base: The base model: a path, an opened checkpoint, or a `Base`. Some formats need its names or sizes.
        dtype: The dtype of the stored factors; if None, each module keeps its own.
        allow_partial: Leave out what the format cannot hold, and list it in the report.
        alpha: The alpha of modules whose file does not state it. Without it, their scale is assumed to be 1.
        serve: Write the adapter as this server loads it (vllm, sglang, ...), with one rank and one alpha for all
            modules. Only for the format peft.
        include: Globs over module names; empty selects all.
        exclude: Globs of names to leave out.
        from_format: The format of the adapter; detected from the content if None.
        rank_from: `tensors` or `config`: which rank the scale is computed from, if the two disagree.
        expert_packing: `peft` or `expert-major`: how the columns of B are ordered for fused experts, if the files do
            not say.
        expert_orientation: `out-in` or `in-out`: the orientation of square fused experts, if the files do not say.
        set_metadata: Texts for the header of the file: `{"modelspec.title": "Ink"}`. An empty text removes the key.
        strip_metadata: Leave out the texts in the header of the source, such as prompts and training settings.
        overwrite: Replace an output that loratools wrote. Files of other origin are never replaced.
        card: Write a model card (`README.md`) into an output folder.
        plan: List what would be left out, from headers only, and write nothing.
        resume: Go on with a killed run of the same plan, which gives the bytes of an undisturbed run. With other
            inputs, options or versions it is refused; where no run was killed, the work begins anew.

    Returns:
        A report with the relative error of each module, what was dropped and why, and which metadata was kept.

    Raises:
        UsageError: The format does not exist, or loratools cannot write it;
            or a killed run had something else to do.
        ChangedInputError: An input changed meanwhile, or since the run was killed.
        UnsupportedError: The format cannot hold parts of the adapter, all of which are named; or the scale is
            uncertain.
        InputError: Values are NaN or infinite.
        OutputExistsError: `out` exists and may not be replaced, or is the input.

    Example:
        >>> import loratools
        >>> base = "fixtures/llama-tiny"
        >>> report = loratools.convert("fixtures/llama-tiny-science", "science-mlx", format="mlx", base=base)
        >>> report.max_relative_error < 1e-6
        True
    """
    options = result_options(convert, locals(), inputs=["adapter"])
    formats.writer(format)
    metadata = EditedMetadata(set_metadata or {}, strip_metadata)
    metadata.check(format)
    out = formats.named(Path(out), format)
    cast_to = stored_dtype(dtype) if dtype is not None else None
    if serve is not None and format != "peft":
        raise UsageError(f"--serve needs --to peft, the format that servers load, and not {format}")
    known = known_base(base)
    # Only PEFT's own config can record that the initialisation changed the base.
    keeps_initialisation = format == "peft" and serve is None
    reading = Reading(
        rank_from=rank_from,
        expert_packing=expert_packing,
        expert_orientation=expert_orientation,
        from_format=from_format,
        alpha=alpha,
        leave_out=LeaveOut.of(include, exclude, unread=allow_partial),
    )
    unselected = load_adapter(adapter, replace(reading, moved=keeps_initialisation, base=known))
    if keep_stored_names([unselected], format, known):
        unselected = load_adapter(adapter, replace(reading, stored_names=True))
    inputs = [unselected.path] if unselected.path is not None else []
    check_output(out, overwrite=overwrite, inputs=inputs)

    source = unselected.selected(include, exclude)
    target = rewritten(source, format, known, serve=serve)
    _refuse_unwritable(target, format, allow_partial=allow_partial)
    written_adapter = metadata.of(_without(target.adapter, target.unwritable))
    if not written_adapter.updates and not written_adapter.replacements:
        raise UnsupportedError(f"nothing of {quoted(source.name)} can be written as {format}")
    dropped = _dropped(unselected, source, target)
    warnings = [*unselected.warnings, *assumed_alpha_warnings(source), *target.warnings]
    if plan:
        return ConvertReport(
            source_format=source.format,
            target_format=format,
            tensors_in=len(source.tensors()),
            tensors_out=len(written_adapter.tensors()),
            modules=(),
            max_relative_error=None,
            dropped=dropped,
            kept=(),
            recomputed=(),
            bytes=_planned_bytes(written_adapter, cast_to),
            output=None,
            warnings=tuple(warnings),
        )
    fetch_values(source)
    if serve is not None:
        written_adapter, serve_warnings = served(written_adapter, serve, cast_to)
        warnings += serve_warnings
    resumable: Resumable | None = None
    if is_worth_keeping(sum(t.nbytes for t in source.tensors().values()), resume=resume):
        meaning = {name: value for name, value in options.items() if name != "base"} | {"dtype": cast_to}
        resumable = Resumable(adapters_plan("convert", [source], known, meaning), resume)
    remarks = [] if resume else abandoned_warnings(out)
    with formats.staged(
        written_adapter,
        out,
        format=format,
        dtype=cast_to,
        overwrite=overwrite,
        inputs=inputs,
        base=target.base,
        resumable=resumable,
    ) as written:
        result = _read_back(written.path, written_adapter, format, target.base)
        comparisons = ComparedModules()
        if resumable is not None:
            comparisons = ComparedModules(written.prepared.journal, written.prepared.resumed)
        modules = compare(target.original, result, target.pieces, target.unwritable, comparisons)
        _refuse_wrong(modules, target.original, format)
        records = _Metadata.of(written_adapter, result)
        nbytes = sum(t.nbytes for t in result.tensors().values())
        if card:
            facts = [
                ("formats", f"{source.format} to {format}"),
                ("largest relative error of a module", f"{max((m.error for m in modules), default=0.0):.4g}"),
            ]
            facts += [(f"left out: {skipped.name}", skipped.why) for skipped in dropped]
            origin = card_input(source.path)
            AdapterCard(
                "convert",
                f"{origin.name} as {format}",
                source.base_model,
                [origin],
                [origin.name],
                options,
                convert,
                facts,
                [*warnings, *written.warnings],
                renamed={"format": "to"},
                with_torch=False,
            ).write(written.path, out, format, sorted({u.kind for u in written_adapter.updates.values()}))
        if resume and written.tensors is not None:
            reused_units = written.tensors.reused + comparisons.reused
            units = written.tensors.written + comparisons.compared
            remarks = resumed_remarks(out, written.prepared.resumed, reused_units, units)
    return ConvertReport(
        source_format=source.format,
        target_format=format,
        tensors_in=len(source.tensors()),
        tensors_out=len(result.tensors()),
        modules=tuple(modules),
        max_relative_error=max((m.error for m in modules), default=0.0),
        dropped=(*dropped, *(Skipped(n, f"{format} has no place for it", "metadata") for n in records.dropped)),
        kept=records.unchanged,
        recomputed=records.recomputed,
        bytes=nbytes,
        output=out,
        warnings=(*warnings, *written.warnings, *remarks),
    )


def _refuse_unwritable(target: Rewritten, format: str, *, allow_partial: bool) -> None:
    if target.unwritable and not allow_partial:
        names = {*target.adapter.updates, *target.adapter.replacements}
        is_a_part = bool(names - set(target.unwritable))
        raise UnsupportedError(
            f"{counted(len(target.unwritable), 'part')} of {quoted(target.adapter.name)} cannot be written as {format}",
            details=[f"{name}: {why}" for name, why in sorted(target.unwritable.items())],
            hint="leave them out, and have them listed, with --allow-partial" if is_a_part else None,
        )


def _without(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    if not names:
        return adapter
    return replace(
        adapter,
        updates={n: u for n, u in adapter.updates.items() if n not in names},
        replacements={n: r for n, r in adapter.replacements.items() if n not in names},
    )


def _dropped(unselected: Adapter, selected: Adapter, target: Rewritten) -> tuple[Skipped, ...]:
    """Modules and replaced weights of the source that are not in the result, by name; then tensors not read."""
    reasons = dict.fromkeys([*unselected.updates, *unselected.replacements], EXCLUDED)
    reasons = {n: w for n, w in reasons.items() if n not in selected.updates and n not in selected.replacements}
    weights = {**unselected.replacements, **target.original.replacements}
    return (
        *(
            Skipped(name, why, "weight" if name in weights else "module")
            for name, why in sorted({**reasons, **target.unwritable}.items())
        ),
        *(Skipped(name, f"not read as {unselected.format}") for name in unselected.unread_tensors),
    )


def _planned_bytes(adapter: Adapter, dtype: str | None) -> int:
    def stored(kind: str) -> str:
        return dtype if dtype is not None and kind in FLOAT_DTYPES else kind

    return sum(t.elements * DTYPE_BITS[stored(t.dtype)] // 8 for t in adapter.tensors().values())


def _read_back(path: Path, adapter: Adapter, format: str, base: Base | None) -> Adapter:
    try:
        return formats.load(path, from_format=format, base=base, stored_names=adapter.stored_names)
    except MachineError:
        raise
    except LoraToolsError as error:
        # A bug of ours, not a fault of the input.
        raise RuntimeError(f"what was written as {format} could not be read back: {error}") from error


def _refuse_wrong(checked: Sequence[ConvertedModule], source: Adapter, to: str) -> None:
    wrong = [c for c in checked if not c.explained]
    if wrong:
        # A comparison would be meaningless then, and the fault is not ours.
        refuse_not_finite({source.name: source.tensors()})
        lines = [f"{quoted(c.name)}: relative error {c.error:.3g}" for c in wrong]
        # A bug of ours, not a fault of the input: nothing is committed.
        raise RuntimeError(
            f"what was written as {to} is not what was read, beyond rounding, in {len(wrong)} of {len(checked)} parts; "
            f"nothing was kept: {'; '.join(shown(lines))}"
        )


@dataclass(frozen=True)
class _Metadata:
    """Names of the metadata entries of the source: kept, recomputed and dropped."""

    unchanged: tuple[str, ...]
    recomputed: tuple[str, ...]
    dropped: tuple[str, ...]

    @classmethod
    def of(cls, source: Adapter, result: Adapter) -> _Metadata:
        before, after = records_of(source), records_of(result)
        return cls(
            unchanged=tuple(name for name, value in before.items() if after.get(name) == value),
            recomputed=tuple(name for name, value in before.items() if name in after and after[name] != value),
            dropped=tuple(name for name in before if name not in after),
        )
