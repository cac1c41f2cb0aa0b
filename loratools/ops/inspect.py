"""inspect: what an adapter or a checkpoint holds, from headers alone.

Importing this file, and inspecting without `values`, imports neither torch nor numpy.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from loratools import formats, registry
from loratools.adapter import Adapter
from loratools.arguments import checked
from loratools.errors import InputError, LoraToolsError
from loratools.short_repr import counted, one_line
from loratools.storage.held_inputs import holding_inputs
from loratools.tensors.dtypes import DTYPE_BITS
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from loratools.checkpoints import Checkpoint

# Large enough that the disk is the limit, small enough that memory does not grow with the tensor.
_BLOCK_BYTES = 16 << 20
# Of a report, in a console.
_SHOWN_SOURCES = 4

_Key = TypeVar("_Key", str, int, float)


# Named tuples and not dataclasses: to define one costs 0.1 ms and not 0.6, which every start of `inspect` would pay.


class Values(NamedTuple):
    """What only the values of an update can tell: all of `dW`, scale included.

    The numbers are None where the delta is not low rank, and where a factor is not finite.
    """

    norm: float | None
    spectral_norm: float | None
    stable_rank: float | None
    effective_rank: float | None
    singular_values: tuple[float, ...] | None
    finite: bool | None
    zero: bool | None

    def __repr__(self) -> str:
        return one_line(self)

    def to_dict(self) -> dict[str, object]:
        s = self.singular_values
        return {**self._asdict(), "singular_values": None if s is None else list(s)}


class InspectedModule(NamedTuple):
    """One update of an adapter."""

    name: str
    target: str
    kind: str
    rank: int | None
    alpha: float | None
    alpha_source: str
    scale: float
    shape: tuple[int | None, ...]
    dtype: str
    parameters: int
    dora: bool
    values: Values | None = None

    def __repr__(self) -> str:
        return one_line(self)

    def to_dict(self) -> dict[str, object]:
        return {
            "name": self.name,
            "target": self.target,
            "kind": self.kind,
            "rank": self.rank,
            "alpha": self.alpha,
            "alpha_source": self.alpha_source,
            "scale": self.scale,
            "out_features": self.shape[0] if self.shape else None,
            "in_features": self.shape[1] if len(self.shape) > 1 else None,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "parameters": self.parameters,
            "dora": self.dora,
            **(self.values.to_dict() if self.values is not None else {}),
        }


class TensorEntry(NamedTuple):
    """A whole tensor: of a checkpoint, or one with which an adapter replaces a weight.

    `non_finite`: how many of its values are NaN or infinite; None where that was not asked for or cannot be known.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    non_finite: int | None = None


class AdapterEntry(NamedTuple):
    path: str
    format: str
    base_model: str | None
    bytes: int
    parameters: int
    dtypes: Mapping[str, int]
    modules: tuple[InspectedModule, ...]
    replacements: tuple[TensorEntry, ...]
    metadata: Mapping[str, object]
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        return one_line(self)

    @property
    def untrained(self) -> tuple[str, ...]:
        """Modules that change nothing; empty where the values were not read."""
        return tuple(m.name for m in self.modules if m.values is not None and m.values.zero)

    @property
    def not_finite(self) -> tuple[str, ...]:
        """Modules and replaced weights with NaN or infinite values; empty where the values were not read."""
        return (
            *(m.name for m in self.modules if m.values is not None and m.values.finite is False),
            *(t.name for t in self.replacements if t.non_finite),
        )

    @property
    def value_warnings(self) -> tuple[str, ...]:
        """What the values are a reason to warn of, with every name; empty where they were not read."""
        found = [f"values not finite in {', '.join(self.not_finite)}"] if self.not_finite else []
        if self.untrained:
            found.append(f"untrained modules, which change nothing: {', '.join(self.untrained)}")
        return tuple(found)

    def rows(self) -> list[dict[str, object]]:
        """Return one row per module, for a data frame: `pandas.DataFrame(report.rows())`."""
        return [module.to_dict() for module in self.modules]

    def to_dict(self) -> dict[str, object]:
        ranks = _counted(m.rank for m in self.modules if m.rank is not None)
        return {
            "path": self.path,
            "format": self.format,
            "layout": None,
            "base_model": self.base_model,
            "bytes": self.bytes,
            "parameters": self.parameters,
            "ranks": {str(rank): count for rank, count in ranks.items()},
            "scales": [{"scale": s, "modules": n} for s, n in _counted(m.scale for m in self.modules).items()],
            "kinds": _counted(m.kind for m in self.modules),
            "dtypes": dict(self.dtypes),
            "modules": [m.to_dict() for m in self.modules],
            "replacements": [_replacement_json(t) for t in self.replacements],
            # Every tensor of an adapter is an update's or a replacement, or loading it fails.
            "other_tensors": [],
            "metadata": dict(self.metadata),
            "warnings": [*self.value_warnings, *self.warnings],
        }


class QuantisedEntry(NamedTuple):
    """Weights of a checkpoint that are quantised in one way. `why` they are not read, where they are not."""

    scheme: str
    format: str | None
    bits: float | None
    group: int | None
    weights: tuple[str, ...]
    why: str | None = None

    def __repr__(self) -> str:
        return one_line(self)

    def to_dict(self) -> dict[str, object]:
        return {**self._asdict(), "weights": list(self.weights)}


class CheckpointEntry(NamedTuple):
    path: str
    layout: str
    architecture: str | None
    bytes: int
    parameters: int
    dtypes: Mapping[str, int]
    quantization: str | None
    quantised: tuple[QuantisedEntry, ...]
    tensors: tuple[TensorEntry, ...]
    tied: Mapping[str, str]
    side_files: tuple[str, ...]
    left_out: Mapping[str, str]
    warnings: tuple[str, ...]
    values_read: bool

    def __repr__(self) -> str:
        return one_line(self)

    @property
    def not_finite(self) -> tuple[str, ...]:
        """Tensors with NaN or infinite values; empty where the values were not read."""
        return tuple(t.name for t in self.tensors if t.non_finite)

    @property
    def value_warnings(self) -> tuple[str, ...]:
        """What the values are a reason to warn of, with every name; empty where they were not read."""
        return (f"values not finite in {', '.join(self.not_finite)}",) if self.not_finite else ()

    def rows(self) -> list[dict[str, object]]:
        """Return one row per tensor, for a data frame: `pandas.DataFrame(report.rows())`."""
        return [_tensor_json(t, values=self.values_read) for t in self.tensors]

    def to_dict(self) -> dict[str, object]:
        return {
            "path": self.path,
            "format": None,
            "layout": self.layout,
            "architecture": self.architecture,
            "bytes": self.bytes,
            "parameters": self.parameters,
            "dtypes": dict(self.dtypes),
            "quantization": self.quantization,
            "quantised": [entry.to_dict() for entry in self.quantised],
            "tensors": self.rows(),
            "tied": dict(self.tied),
            "side_files": list(self.side_files),
            "left_out": [{"name": name, "why": why} for name, why in self.left_out.items()],
            "warnings": [*self.value_warnings, *self.warnings],
        }


class FailedEntry(NamedTuple):
    """A source that could not be inspected, at its place among those that could."""

    path: str
    error: LoraToolsError

    def __repr__(self) -> str:
        return one_line(self)

    def rows(self) -> list[dict[str, object]]:
        """Return no rows: the source could not be read, for a data frame: `pandas.DataFrame(report.rows())`."""
        return []

    def to_dict(self) -> dict[str, object]:
        error = self.error
        told = {"code": error.code, "message": error.message, "hint": error.hint, "details": list(error.details)}
        return {"path": self.path, "error": told}


Entry = AdapterEntry | CheckpointEntry | FailedEntry


class InspectReport(NamedTuple):
    """What the sources hold, in the order in which they were given; those found in a folder by name."""

    sources: tuple[Entry, ...]

    def __repr__(self) -> str:
        lines = [f"  {one_line(entry)}" for entry in self.sources[:_SHOWN_SOURCES]]
        if (more := len(self.sources) - _SHOWN_SOURCES) > 0:
            lines.append(f"  … and {counted(more, 'source')} more")
        return "\n".join(["InspectReport", *lines])

    @property
    def error(self) -> InputError | None:
        """What went wrong, where some of several sources could not be inspected."""
        failed = [e for e in self.sources if isinstance(e, FailedEntry)]
        if not failed:
            return None
        return InputError(
            f"{len(failed)} of {len(self.sources)} sources could not be inspected",
            details=[f"{e.path}: {e.error.message}" for e in failed],
        )

    def rows(self) -> list[dict[str, object]]:
        """Return one row per module of an adapter and per tensor of a checkpoint, each with the path of its source.

        For a data frame: `pandas.DataFrame(report.rows())`.
        """
        return [{"path": entry.path, **row} for entry in self.sources for row in entry.rows()]

    def to_dict(self) -> dict[str, object]:
        """Return the document of `loratools inspect --json`, without its head."""
        return {"sources": [entry.to_dict() for entry in self.sources]}


@checked(Checkpoint="loratools.checkpoints")
def inspect(
    *sources: str | Path | Adapter | Checkpoint,
    values: bool = False,
    from_format: str | None = None,
    rank_from: formats.RankFrom | None = None,
    base: str | Path | Checkpoint | formats.Base | None = None,
    progress: Callable[[int], None] | None = None,
) -> InspectReport:
    """Return what each source holds: an adapter, a checkpoint, or a folder of several of them.

    Of one source that cannot be inspected the error is raised; of several, it takes the place of the source.

    Args:
        sources: Paths, loaded adapters or opened checkpoints.
        values: Also read the values: norms and spectra of every update, from its factors, and values that are not
            finite. This reads the whole file.
        from_format: The format of the adapters, where it is not to be found from the content.
        rank_from: `tensors` or `config`: which rank makes the scale, where the two disagree.
        base: The model that the adapters are for, where their names alone do not tell: its path, opened, or its names
            and config.
        progress: Called with the number of bytes just read, with `values`.

    Returns:
        A report with one entry per source, in the order in which they were given.

    Raises:
        UsageError: Nothing is at the only source.
        InputError: The only source is damaged, unsafe or not supported.

    Example:
        >>> import loratools
        >>> report = loratools.inspect("fixtures/llama-tiny-science", values=True)
        >>> report.rows()[0]["name"], report.rows()[0]["rank"]
        ('model.layers.0.mlp.down_proj', 16)
    """
    from loratools.formats.common.opened_base import known_base

    known = known_base(base)
    options = _Options(values, from_format, rank_from, known, progress or (lambda done: None))
    # Of headers alone nothing is computed that a later change could contradict.
    with holding_inputs() if values else nullcontext():
        return InspectReport(tuple(_entries(sources, options)))


def _entries(sources: Sequence[str | Path | Adapter | Checkpoint], options: _Options) -> list[Entry]:
    entries: list[Entry] = []
    for source in sources:
        if not isinstance(source, (str, Path)):
            entries.append(_entry_of_opened(source, options))
            continue
        path = Path(source)
        try:
            found = _members(path, options.format)
        except (LoraToolsError, OSError) as error:
            if len(sources) == 1:
                raise
            entries.append(FailedEntry(str(source), _told(error)))
            continue
        for member in found:
            # As it was given: Path drops a leading `./`, and scripts look their own spelling up.
            shown = str(source) if member.path == path else str(member.path)
            try:
                entries.append(_entry(member, shown, options))
            except (LoraToolsError, OSError) as error:
                if len(sources) == len(found) == 1:
                    raise
                entries.append(FailedEntry(shown, _told(error)))
    return entries


class _Options(NamedTuple):
    values: bool
    format: str | None
    rank_from: formats.RankFrom | None
    base: formats.Base | None
    progress: Callable[[int], None]


class _Member(NamedTuple):
    path: Path
    is_adapter: bool


def _told(error: LoraToolsError | OSError) -> LoraToolsError:
    if isinstance(error, LoraToolsError):
        return error
    return InputError(f"it cannot be read: {(error.strerror or str(error)).lower()}")


def _members(path: Path, format: str | None) -> list[_Member]:
    """What there is to inspect at `path`: itself, or the adapters and checkpoints in a folder that is neither."""
    if format is not None:
        return [_Member(path, is_adapter=True)]
    if not path.is_dir():
        # Of a file the content decides; what is not there is for `open_checkpoint` to tell.
        return [_Member(path, is_adapter=path.exists() and formats.is_adapter_shaped(path))]
    adapters = formats.find_adapters(path)
    if path in adapters:
        return [_Member(path, is_adapter=True)]
    if _is_checkpoint(path):
        return [_Member(path, is_adapter=False)]
    models = [child for child in sorted(path.iterdir()) if child.is_dir() and _is_checkpoint(child)]
    adapters = [*adapters, *formats.find_files(path)]
    found = [_Member(p, is_adapter=True) for p in adapters] + [_Member(p, is_adapter=False) for p in models]
    # Neither: opening it tells what it is instead.
    return sorted(found, key=lambda m: _natural(m.path)) or [_Member(path, is_adapter=False)]


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """checkpoint-500 before checkpoint-1000."""
    return [(0, int(w), "") if w.isdecimal() else (1, 0, w) for w in re.split(r"([0-9]{1,9})", str(path)) if w]


def _is_checkpoint(path: Path) -> bool:
    return any(registry.load("checkpoints", name).detect(path) for name in registry.names("checkpoints"))


def _entry(member: _Member, shown: str, options: _Options) -> AdapterEntry | CheckpointEntry:
    if member.is_adapter:
        adapter = formats.load(member.path, from_format=options.format, rank_from=options.rank_from, base=options.base)
        return _adapter_entry(adapter, shown, options)
    # Here, because an adapter needs none of it.
    from loratools import checkpoints

    return _checkpoint_entry(checkpoints.open_checkpoint(member.path), shown, options)


def _entry_of_opened(source: Adapter | Checkpoint, options: _Options) -> AdapterEntry | CheckpointEntry:
    if isinstance(source, Adapter):
        return _adapter_entry(source, source.name, options)
    return _checkpoint_entry(source, source.name, options)


def _adapter_entry(adapter: Adapter, shown: str, options: _Options) -> AdapterEntry:
    # What several modules share (VeRA's A and B) is stored once.
    tensors = dict.fromkeys(tensor for update in adapter.updates.values() for tensor in update.parts.values())
    tensors |= dict.fromkeys(replacement.tensor for replacement in adapter.replacements.values())
    replaced = {name: r.tensor for name, r in adapter.replacements.items()}
    return AdapterEntry(
        path=shown,
        format=adapter.format,
        base_model=adapter.base_model,
        bytes=_bytes(tensors),
        parameters=sum(t.elements for t in tensors),
        dtypes=_counted(t.dtype for t in tensors),
        modules=tuple(_module(name, update, options) for name, update in adapter.updates.items()),
        replacements=tuple(_tensor_entries(replaced, options)),
        metadata=adapter.notes,
        warnings=(*adapter.uncertainties, *adapter.warnings),
    )


def _checkpoint_entry(checkpoint: Checkpoint, shown: str, options: _Options) -> CheckpointEntry:
    architectures = checkpoint.config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return CheckpointEntry(
        path=shown,
        layout=checkpoint.layout,
        architecture=first if isinstance(first, str) else None,
        bytes=_bytes(checkpoint.stored.values()),
        parameters=_parameters(checkpoint),
        dtypes=_counted(t.dtype for t in checkpoint.stored.values()),
        quantization=checkpoint.quantization,
        quantised=_quantised(checkpoint),
        tensors=tuple(_stored_entries(checkpoint, options)),
        tied=dict(sorted(checkpoint.tied.items())),
        side_files=tuple(f.name for f in checkpoint.side_files),
        left_out={f.name: f.why for f in checkpoint.left_out},
        warnings=checkpoint.warnings,
        values_read=options.values,
    )


def _parameters(checkpoint: Checkpoint) -> int:
    """How many numbers the weights have; of those that cannot be unpacked, how many are stored."""
    unreadable = checkpoint.quantisation.unreadable.values() if checkpoint.quantisation is not None else ()
    stored = sum(checkpoint.stored[name].elements for weight in unreadable for name in weight.stored)
    return stored + sum(tensor.elements for tensor in checkpoint.weights.values())


def _quantised(checkpoint: Checkpoint) -> tuple[QuantisedEntry, ...]:
    """The quantised weights, those of one scheme and one set of parameters together."""
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
    dtypes = {t.dtype for t in parts.values()}
    values = None
    if options.values:
        values = _values(update)
        options.progress(sum(t.nbytes for t in parts.values()))
    return InspectedModule(
        name=name,
        target=name,
        kind=update.kind,
        rank=update.rank,
        alpha=update.alpha,
        alpha_source=update.alpha_source,
        scale=update.scale,
        shape=update.shape,
        dtype="+".join(sorted(dtypes)),
        parameters=sum(t.elements for t in parts.values()),
        dora="magnitude" in parts,
        values=values,
    )


def _values(update: Update) -> Values:
    from loratools.algebra import lowrank, spectrum

    factors = update.factors()
    if factors is None:
        return Values(None, None, None, None, None, None, None)
    # Before the decomposition, which has no answer for such input. A sum is not finite if a term is not.
    if not all(bool(f.isfinite().all()) for f in (factors.a, factors.b)):
        return Values(None, None, None, None, None, finite=False, zero=False)
    s = lowrank.singular_values(factors)
    zero = not bool(s.any())
    return Values(
        norm=float(s.norm()),
        spectral_norm=float(s.max()) if s.numel() else 0.0,
        stable_rank=spectrum.stable_rank(s),
        effective_rank=spectrum.effective_rank(s),
        singular_values=tuple(s.tolist()),
        finite=True,
        zero=zero,
    )


def _tensor_entries(tensors: Mapping[str, LazyTensor], options: _Options) -> Iterator[TensorEntry]:
    for name, tensor in tensors.items():
        found = _non_finite(tensor, options.progress) if options.values else None
        yield TensorEntry(name, tensor.shape, tensor.dtype, tensor.elements, found)


def _stored_entries(checkpoint: Checkpoint, options: _Options) -> Iterator[TensorEntry]:
    """The stored tensors by name. Of packed numbers, the values that they mean are looked at."""
    weights = checkpoint.quantisation.weights if checkpoint.quantisation is not None else {}
    packed = {weight.stored_names[0]: checkpoint.weights[name] for name, weight in weights.items()}
    for name, tensor in sorted(checkpoint.stored.items()):
        found = None
        if options.values and name in packed:
            found = _non_finite(packed[name], lambda done: None)
            options.progress(tensor.nbytes)
        elif options.values:
            found = _non_finite(tensor, options.progress)
        yield TensorEntry(name, tensor.shape, tensor.dtype, tensor.elements, found)


def _non_finite(tensor: LazyTensor, progress: Callable[[int], None]) -> int | None:
    """How many values are NaN or infinite, a block of rows at a time; None for packed values, which only their scheme
    can tell."""
    if tensor.dtype in ("F4", "F6_E2M3", "F6_E3M2"):
        return None
    if not tensor.dtype.startswith(("F", "BF", "C")):
        return 0
    found = 0
    blocks = max(1, -(-tensor.nbytes // _BLOCK_BYTES))
    rows = -(-tensor.shape[0] // blocks) if tensor.shape else 1
    for start in range(0, tensor.shape[0] if tensor.shape else 1, rows or 1):
        block = tensor.source.read_rows(start, min(start + rows, tensor.shape[0] if tensor.shape else 1))
        # torch has no isfinite for the dtypes of one byte; float32 holds them exactly.
        block = block.float() if block.element_size() == 1 else block
        found += int((~block.isfinite()).sum())
        progress(block.numel() * DTYPE_BITS[tensor.dtype] // 8)
    return found


def _bytes(tensors: Iterable[LazyTensor]) -> int:
    """Size of the files that the tensors are stored in; of the tensors themselves, where they have no place there."""
    tensors = list(tensors)
    files = {t.location.file for t in tensors if t.location is not None}
    return sum(f.size for f in files) if files else sum(t.nbytes for t in tensors)


def _counted(values: Iterable[_Key]) -> dict[_Key, int]:
    return dict(sorted(Counter(values).items()))


def _replacement_json(tensor: TensorEntry) -> dict[str, object]:
    found = {} if tensor.non_finite is None else {"non_finite": tensor.non_finite}
    return {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype, **found}


def _tensor_json(tensor: TensorEntry, *, values: bool) -> dict[str, object]:
    found = {"non_finite": tensor.non_finite} if values else {}
    head = {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype}
    return {**head, "parameters": tensor.parameters, **found}
