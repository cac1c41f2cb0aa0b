"""inspect: what an adapter or a checkpoint holds, from headers only.

Importing this file, and inspecting without `values`, imports neither torch nor numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from loratools import formats
from loratools.adapter import Adapter
from loratools.arguments import Globs, checked
from loratools.errors import LoraToolsError
from loratools.formats.common.expert_layout import with_expert_layout
from loratools.formats.common.leave_out import LeaveOut, names_of_key
from loratools.formats.common.source import open_source
from loratools.formats.image_parts.notes import NOTES, described
from loratools.naming.hub_names import is_hub_name
from loratools.ops.common.fetching import fetch_values
from loratools.ops.common.progress import bytes_of, expect
from loratools.ops.common.unreadable import as_ours
from loratools.ops.inspect.entries import (
    AdapterEntry,
    CheckpointEntry,
    Entry,
    FailedEntry,
    InspectedModule,
    InspectReport,
    NotListed,
    QuantisedEntry,
    TensorEntry,
    frequencies,
)
from loratools.ops.inspect.sources import FoundSource, sources_at
from loratools.ops.inspect.training_run import TrainingRun, training_runs
from loratools.ops.inspect.values import non_finite_count, update_values
from loratools.selection import NameSelection
from loratools.sources.cache import cached_repository
from loratools.sources.local import local_path
from loratools.storage.held_inputs import holding_inputs
from loratools.storage.origins import shown
from loratools.tensors.lazy import LazyTensor
from loratools.updates.lora_experts import Packing
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from loratools.checkpoints import Checkpoint


@checked(Checkpoint="loratools.checkpoints")
def inspect(
    *sources: str | Path | Adapter | Checkpoint,
    values: bool = False,
    include: Globs = (),
    exclude: Globs = (),
    from_format: str | None = None,
    rank_from: formats.RankFrom | None = None,
    expert_packing: Packing | None = None,
    base: str | Path | Checkpoint | formats.Base | None = None,
    progress: Callable[[int], None] | None = None,
) -> InspectReport:
    """Return what each source holds: an adapter, a checkpoint, or a folder of several of them.

    If the only source cannot be inspected, its error is raised. With several sources, the error becomes the entry of
    that source.

    Args:
        sources: Paths, loaded adapters or opened checkpoints.
        values: Also read the values: norms and spectra of every update, and NaN and infinite values. This reads the
            whole file.
        include: Globs over the names of modules, replaced weights and tensors of models; empty selects all. A glob need
            not match in every source.
        exclude: Globs of names to leave out.
        from_format: The format of the adapters; detected from the content if None.
        rank_from: `tensors` or `config`: which rank the scale is computed from, if the two disagree.
        expert_packing: `peft` or `expert-major`: how the columns of B are ordered for fused experts, if the files do
            not say.
        base: The base model, needed if module names alone are ambiguous: a path, an opened checkpoint, or a `Base`.
        progress: Called with the number of bytes read since the last call, if `values` is set. If it has a method
            `expect`, that method is called first, with the total.

    Returns:
        A report with one entry per source, in the order given. A folder of several adapters has one entry for each
        adapter, model and broken file below it.

    Raises:
        UsageError: The only source does not exist, or a glob matches nothing.
        InputError: The only source is damaged, unsafe or not supported.

    Example:
        >>> import loratools
        >>> report = loratools.inspect("fixtures/llama-tiny-science", values=True)
        >>> report.rows()[0]["name"], report.rows()[0]["rank"]
        ('model.layers.0.mlp.down_proj', 16)
    """
    from loratools.formats.common.opened_base import known_base

    names = NameSelection(include, exclude)
    options = _Options(
        values, from_format, rank_from, expert_packing, known_base(base), progress or (lambda nbytes: None), names
    )
    # Headers alone are read at once, so that no later change can contradict the result.
    with holding_inputs() if values else nullcontext():
        not_listed: list[NotListed] = []
        runs: list[TrainingRun] = []
        opened: Iterable[_Opened | FailedEntry] = _opened_sources(sources, options, not_listed, runs)
        if values:
            opened = list(opened)  # the total is known once every header is read
            fetch_values(*(each.source for each in opened if isinstance(each, _Opened)))
            expect(progress, sum(_bytes_to_read(each.source) for each in opened if isinstance(each, _Opened)))
        entries = [each if isinstance(each, FailedEntry) else _entry(each, options) for each in opened]
        names.require_matches()
        return InspectReport(tuple(entries), tuple(not_listed), tuple(runs))


class _Options(NamedTuple):
    values: bool
    format: str | None
    rank_from: formats.RankFrom | None
    expert_packing: Packing | None
    base: formats.Base | None
    progress: Callable[[int], None]
    names: NameSelection


class _Opened(NamedTuple):
    """A source whose headers have been read, and the path to call it by."""

    source: Adapter | Checkpoint
    path: str


def _opened_sources(
    sources: Sequence[str | Path | Adapter | Checkpoint],
    options: _Options,
    not_listed: list[NotListed],
    runs: list[TrainingRun],
) -> Iterator[_Opened | FailedEntry]:
    for source in sources:
        if not isinstance(source, (str, Path)):
            yield _Opened(_selected(source, options.names), source.name)
            continue
        try:
            path = local_path(source)
            search = sources_at(path, options.format)
        except (LoraToolsError, OSError) as error:
            if len(sources) == 1:
                raise
            yield FailedEntry(str(source), as_ours(error))
            continue
        not_listed += search.not_listed
        runs += training_runs(path, [each.path for each in search.sources])
        for each in search.sources:
            # As it was given: Path drops a leading `./`, and scripts look up their own spelling.
            name = str(source) if each.path == path else shown(each.path)
            try:
                yield _Opened(_selected(_open(each, options), options.names), name)
            except (LoraToolsError, OSError) as error:
                if len(sources) == len(search.sources) == 1:
                    raise
                yield FailedEntry(name, as_ours(error))


def _open(source: FoundSource, options: _Options) -> Adapter | Checkpoint:
    if source.error is not None:
        raise source.error
    if source.is_adapter:
        opened = replace(
            open_source(source.path, base=options.base),
            leave_out=LeaveOut(options.names.include, options.names.exclude),
        )
        adapter = formats.load_source(opened, format=options.format, rank_from=options.rank_from)
        if any(update.as_experts() is not None for update in adapter.updates.values()):
            # Applies to the only source.
            (adapter,) = with_expert_layout([adapter], packing=options.expert_packing)
        return adapter
    # Imported here, because adapters do not need it.
    from loratools import checkpoints

    return checkpoints.open_checkpoint(source.path)


def _bytes_to_read(source: Adapter | Checkpoint) -> int:
    tensors = source.tensors() if isinstance(source, Adapter) else source.stored
    return sum(tensor.nbytes for tensor in tensors.values())


def _entry(opened: _Opened, options: _Options) -> Entry:
    source = opened.source
    if isinstance(source, Adapter):
        return _adapter_entry(source, opened.path, options)
    return _checkpoint_entry(source, opened.path, options)


def _selected(source: Adapter | Checkpoint, names: NameSelection) -> Adapter | Checkpoint:
    """The part of the source that `include` and `exclude` select. Globs also match the logical names of quantised
    weights.
    """
    if not names:
        return source
    if isinstance(source, Adapter):
        selected = set(names.of([*source.updates, *source.replacements], source.aliases))
        names.of(source.unread_tensors, {key: names_of_key(key) for key in source.unread_tensors})
        return replace(
            source,
            updates={name: update for name, update in source.updates.items() if name in selected},
            replacements={name: weight for name, weight in source.replacements.items() if name in selected},
        )
    quantisation = source.quantisation
    stored_names: dict[str, Sequence[str]] = {}
    if quantisation is not None:
        stored_names |= {name: weight.stored_names for name, weight in quantisation.weights.items()}
        stored_names |= {name: weight.stored for name, weight in quantisation.unreadable.items()}
    selected = set(
        names.of(source.stored, {stored: (name,) for name, every in stored_names.items() for stored in every})
    )
    selected_weights = {name for name in source.weights if selected.intersection(stored_names.get(name, (name,)))}
    return replace(
        source,
        stored={name: tensor for name, tensor in source.stored.items() if name in selected},
        weights={name: tensor for name, tensor in source.weights.items() if name in selected_weights},
        quantisation=None
        if quantisation is None
        else replace(
            quantisation,
            weights={n: w for n, w in quantisation.weights.items() if selected.intersection(stored_names[n])},
            unreadable={n: w for n, w in quantisation.unreadable.items() if selected.intersection(stored_names[n])},
        ),
    )


def _adapter_entry(adapter: Adapter, shown: str, options: _Options) -> AdapterEntry:
    # Tensors that several modules share (VeRA's A and B) are stored, and counted, once.
    tensors = dict.fromkeys([tensor for update in adapter.updates.values() for tensor in update.parts.values()])
    tensors |= dict.fromkeys([replacement.tensor for replacement in adapter.replacements.values()])
    replaced = {name: r.tensor for name, r in adapter.replacements.items()}
    family, description = described(adapter)
    if family is None and NOTES not in adapter.notes and not is_hub_name(adapter.base_model):
        family = language_family(adapter)
    return AdapterEntry(
        path=shown,
        format=adapter.format,
        base_model=adapter.base_model,
        bytes=_bytes(tensors, options),
        parameters=sum([math.prod(t.shape) for t in tensors]),
        dtypes=frequencies([t.dtype for t in tensors]),
        modules=tuple(_module(name, update, options) for name, update in adapter.updates.items()),
        replacements=tuple(_tensor_entries(replaced, options)),
        metadata=adapter.notes,
        warnings=(*adapter.open_questions, *adapter.warnings),
        unread_tensors=adapter.unread_tensors,
        family=family,
        description=description,
        revision=_commit(adapter.path),
    )


def language_family(adapter: Adapter) -> str | None:
    """The published language models that have the sizes of the adapter's modules; None if there is none."""
    # Here, because most adapters name their base.
    from loratools.naming.language.shaped_like import ModuleShape, shaped_like

    shapes = [(name, update.shape) for name, update in adapter.updates.items()]
    shapes += [(name.removesuffix(".weight"), r.tensor.shape) for name, r in adapter.replacements.items()]
    return shaped_like(ModuleShape(name, *shape[:2]) for name, shape in shapes if len(shape) == 2)


def _checkpoint_entry(checkpoint: Checkpoint, shown: str, options: _Options) -> CheckpointEntry:
    architectures = checkpoint.config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return CheckpointEntry(
        path=shown,
        layout=checkpoint.layout,
        architecture=first if isinstance(first, str) else None,
        bytes=_bytes(checkpoint.stored.values(), options),
        parameters=_parameters(checkpoint),
        dtypes=frequencies([t.dtype for t in checkpoint.stored.values()]),
        quantization=checkpoint.quantization,
        quantised=_quantised(checkpoint),
        tensors=tuple(_stored_entries(checkpoint, options)),
        tied=dict(sorted(checkpoint.tied.items())),
        side_files=tuple(f.name for f in checkpoint.side_files),
        left_out={f.name: f.why for f in checkpoint.left_out},
        warnings=checkpoint.warnings,
        values_read=options.values,
        revision=_commit(checkpoint.path),
    )


def _commit(path: Path | None) -> str | None:
    """The hash of the commit on the hub that a source is of; None if it is not from there."""
    cached = cached_repository(path) if path is not None else None
    return cached.commit if cached is not None else None


def _parameters(checkpoint: Checkpoint) -> int:
    """The number of weights; for those that cannot be unpacked, the number of stored values."""
    unreadable = checkpoint.quantisation.unreadable.values() if checkpoint.quantisation is not None else ()
    stored = sum(checkpoint.stored[name].elements for weight in unreadable for name in weight.stored)
    return stored + sum(tensor.elements for tensor in checkpoint.weights.values())


def _quantised(checkpoint: Checkpoint) -> tuple[QuantisedEntry, ...]:
    """The quantised weights, grouped by scheme and parameters."""
    if checkpoint.quantisation is None:
        return ()
    readable: dict[tuple[str, str, float, int | None], list[str]] = {}
    for name, weight in checkpoint.quantisation.weights.items():
        parameters = weight.parameters
        key = (weight.scheme, parameters.format, parameters.bits, parameters.group)
        readable.setdefault(key, []).append(name)
    refused: dict[tuple[str, str], list[str]] = {}
    for name, unreadable in checkpoint.quantisation.unreadable.items():
        refused.setdefault((unreadable.scheme, unreadable.why), []).append(name)
    return (
        *(QuantisedEntry(*key, tuple(sorted(names))) for key, names in readable.items()),
        *(QuantisedEntry(scheme, None, None, None, tuple(sorted(n)), why) for (scheme, why), n in refused.items()),
    )


def _module(name: str, update: Update, options: _Options) -> InspectedModule:
    parts = update.parts
    tensors = parts.values()
    dtypes = {t.dtype for t in tensors}
    values = None
    if options.values:
        values = update_values(update)
        options.progress(bytes_of((update,)))
    return InspectedModule(
        name=name,
        target=name,
        kind=update.kind,
        rank=update.rank,
        alpha=update.alpha,
        alpha_source=update.alpha_source,
        scale=update.scale,
        shape=update.shape,
        dtype="+".join(sorted(dtypes)) if len(dtypes) > 1 else next(iter(dtypes), ""),
        parameters=sum([math.prod(t.shape) for t in tensors]),
        dora="magnitude" in parts,
        values=values,
    )


def _tensor_entries(tensors: Mapping[str, LazyTensor], options: _Options) -> Iterator[TensorEntry]:
    for name, tensor in tensors.items():
        non_finite = non_finite_count(tensor, options.progress) if options.values else None
        yield TensorEntry(name, tensor.shape, tensor.dtype, tensor.elements, non_finite)


def _stored_entries(checkpoint: Checkpoint, options: _Options) -> Iterator[TensorEntry]:
    """The stored tensors by name. For packed numbers, the dequantised values are checked."""
    stored = checkpoint.stored
    if not options.values:
        yield from [TensorEntry(name, (t := stored[name]).shape, t.dtype, t.elements) for name in sorted(stored)]
        return
    weights = checkpoint.quantisation.weights if checkpoint.quantisation is not None else {}
    packed = {weight.stored_names[0]: checkpoint.weights[name] for name, weight in weights.items()}
    for name in sorted(stored):
        tensor = stored[name]
        if name in packed:
            non_finite = non_finite_count(packed[name], lambda nbytes: None)
            options.progress(tensor.nbytes)
        else:
            non_finite = non_finite_count(tensor, options.progress)
        yield TensorEntry(name, tensor.shape, tensor.dtype, tensor.elements, non_finite)


def _bytes(tensors: Iterable[LazyTensor], options: _Options) -> int:
    """Size of the files that hold the tensors; of the tensors alone if they are a selection or in memory."""
    tensors = list(tensors)
    # Compared by identity first: 90,000 tensors lie in a few files.
    files = {id(location.file): location.file for t in tensors if (location := t.location) is not None}
    return sum(f.size for f in {*files.values()}) if files and not options.names else sum(t.nbytes for t in tensors)
