"""Write an adapter in another format: read, write, read back, compare, and only then move it into place.

Nothing is lost without a word: what the target has no place for is refused by name, or listed where that was allowed;
texts and fields that the source carried are listed as kept, written anew, or dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from loratools import formats
from loratools.adapter import Adapter
from loratools.arguments import Globs, checked
from loratools.checkpoints import Checkpoint
from loratools.errors import InputError, LoraToolsError, MismatchError, UnsupportedError, UsageError
from loratools.formats import Base
from loratools.formats.common.leave_out import LeaveOut
from loratools.formats.common.notes import records_of
from loratools.formats.common.opened_base import known_base
from loratools.formats.common.source import counted, shown
from loratools.matching import Matches, match
from loratools.naming.language.repeated_layers import stack_to_repeat, with_repeated_layers
from loratools.ops.common.alpha import assumed_alphas
from loratools.ops.common.arguments import RankFrom, load_adapter, stored_dtype
from loratools.ops.convert.client_names import named_for_client
from loratools.ops.convert.experts import unpacked
from loratools.ops.convert.fit import fitted
from loratools.ops.convert.serve import served, taken_apart_for, unservable
from loratools.ops.convert.verify import ConvertedModule, Piece, compare
from loratools.short_repr import few_lines
from loratools.storage.commit import check_output
from loratools.storage.files import quoted
from loratools.storage.held_inputs import holding_inputs
from loratools.tensors.dtypes import DTYPE_BITS, FLOAT_DTYPES
from loratools.updates.lora_experts import Orientation, Packing


@dataclass(frozen=True)
class Dropped:
    """Something of the source that is not in the result: a module, a replaced weight, or a metadata entry."""

    what: str
    name: str
    why: str

    def to_dict(self) -> dict[str, object]:
        return {"what": self.what, "name": self.name, "why": self.why}


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did. `modules` and `max_relative_error` are empty where it was only planned."""

    source_format: str
    target_format: str
    tensors_in: int
    tensors_out: int
    modules: tuple[ConvertedModule, ...]
    max_relative_error: float | None
    dropped: tuple[Dropped, ...]
    kept: tuple[str, ...]
    recomputed: tuple[str, ...]
    bytes: int | None
    output: Path | None
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return few_lines(self)

    def rows(self) -> list[dict[str, object]]:
        """Return one row per module, with its relative error, for a data frame: `pandas.DataFrame(report.rows())`."""
        return [{"name": module.name, "error": module.error} for module in self.modules]

    def to_dict(self) -> dict[str, object]:
        """The document of `loratools convert --json`, without its head."""
        return {
            "source_format": self.source_format,
            "target_format": self.target_format,
            "tensors_in": self.tensors_in,
            "tensors_out": self.tensors_out,
            "max_relative_error": self.max_relative_error,
            "modules": self.rows(),
            "dropped": [d.to_dict() for d in self.dropped],
            "metadata": {"kept": list(self.kept), "recomputed": list(self.recomputed)},
            "bytes": self.bytes,
            "warnings": list(self.warnings),
            "output": str(self.output) if self.output is not None else None,
        }


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
    overwrite: bool = False,
    plan: bool = False,
) -> ConvertReport:
    """Write an adapter in another format, read it back, and keep it only if its products are those of the source.

    Args:
        adapter: The adapter, by its path or loaded.
        out: The folder or file to write, as the format has it.
        format: The format to write, one of `list_formats()`.
        base: The model that it is for: its path, opened, or its names and config. Some formats need its names or sizes.
        dtype: The dtype of the stored factors; each module keeps its own where it is None.
        allow_partial: Leave out, and list, what the format cannot hold.
        alpha: The alpha of modules whose file does not say theirs. Without it their scale is assumed to be 1.
        serve: Write it as this server loads it (vllm, sglang, ...): one rank and one alpha for all; only for peft.
        include: Globs over the names of modules; all are taken where there is none.
        exclude: Globs of what is left out.
        from_format: The format of the adapters, where it is not to be found from the content.
        rank_from: `tensors` or `config`: which rank makes the scale, where the two disagree.
        expert_packing: `peft` or `expert-major`: how fused experts share the columns of B, where the files leave it
            open.
        expert_orientation: `out-in` or `in-out`: how square fused experts are stored, where the files leave it open.
        overwrite: Replace an output that loratools wrote. Files of other origin are never replaced.
        plan: List what would be left out, from headers alone, and write nothing.

    Returns:
        A report: relative errors of modules, what was dropped and why, and what became of the metadata.

    Raises:
        UsageError: There is no such format, or it is not written.
        UnsupportedError: The format cannot hold something, all of it named; or the scale is uncertain.
        InputError: Values that are not finite.
        OutputExistsError: `out` exists, or is the input.

    Example:
        >>> import loratools
        >>> base = "fixtures/llama-tiny"
        >>> report = loratools.convert("fixtures/llama-tiny-science", "science-mlx", format="mlx", base=base)
        >>> report.max_relative_error < 1e-6
        True
    """
    entry = formats.writer(format)
    out = formats.named(Path(out), format)
    cast_to = stored_dtype(dtype) if dtype is not None else None
    known = known_base(base)
    # PEFT's own config keeps what says that the base was changed; no other place does.
    keeps = format == "peft" and serve is None
    leave_out = LeaveOut.of(include, exclude, unread=allow_partial)
    read = partial(
        load_adapter,
        adapter,
        rank_from=rank_from,
        expert_packing=expert_packing,
        expert_orientation=expert_orientation,
        from_format=from_format,
        alpha=alpha,
        leave_out=leave_out,
    )
    source = read(moved=keeps, base=known)
    if source.format == format and formats.keeps_names(format) and known is None:
        # Nothing is renamed where the format stays.
        source = read(stored_names=True)
    inputs = [source.path] if source.path is not None else []
    check_output(out, overwrite=overwrite, inputs=inputs)
    warnings = list(source.warnings)
    everything = source
    source = source.selected(include, exclude)
    unchosen = {
        name: "left out by --include or --exclude"
        for name in [*everything.updates, *everything.replacements]
        if name not in source.updates and name not in source.replacements
    }
    if assumed := assumed_alphas(source):
        warnings.append(
            f"the scale of {counted(len(assumed), 'module')} is not stored and is assumed to be that of alpha "
            f"{_shown_alphas(source, assumed)}: if it was trained with another, give it with --alpha"
        )
    source = formats.fitted_names(source, format)
    formats.ensure_layers(source, format if serve is None else serve)
    known = _with_its_layers(known, source)
    tensors_in = len(source.tensors())
    in_pieces = [*entry.unwritable(source, base=known), *(taken_apart_for(source, serve) if serve is not None else ())]
    source = unpacked(source, in_pieces, known)
    whole = source
    fit = fitted(source, known)
    source = fit.adapter
    if fit.pieces:
        count = sum(name not in source.updates for name in whole.updates)
        warnings.append(f"{counted(count, 'module')} split or joined, as the base has them")
    matches, unclear = _matches(source, known)
    warnings += unclear
    named = named_for_client(source, known, matches, format)
    source, pieces = named.adapter, _renamed_pieces(whole, fit.pieces, named.updates)
    whole = replace(whole, replacements=source.replacements)
    if renamed := {**named.updates, **named.replacements}:
        old, new = next(iter(sorted(renamed.items())))
        client = "mlx-lm" if format == "mlx" else "the model"
        warnings.append(
            f"{counted(len(renamed), 'part')} renamed to what {client} calls them: {quoted(old)} is now {quoted(new)}"
        )
    unwritable = {**entry.unwritable(source, base=known), **named.unknown}
    for left in matches.leftovers if matches is not None else ():
        unwritable.setdefault(renamed.get(left.name, left.name), f"no place in the base: {left.described}")
    if serve is not None:
        if format != "peft":
            raise UsageError(f"--serve is for --to peft, which is what servers load, and not for {format}")
        unwritable |= unservable(source, serve)
    if unwritable and not allow_partial:
        raise UnsupportedError(
            f"{counted(len(unwritable), 'part')} of {quoted(source.name)} cannot be written as {format}",
            details=[f"{name}: {why}" for name, why in sorted(unwritable.items())],
            hint="leave them out, and have them listed, with --allow-partial",
        )
    source = _without(source, unwritable)
    if not source.updates and not source.replacements:
        raise UnsupportedError(f"nothing of {quoted(source.name)} can be written as {format}")
    dropped = [
        Dropped("weight" if name in {**everything.replacements, **whole.replacements} else "module", name, why)
        for name, why in sorted({**unchosen, **unwritable}.items())
    ]
    dropped += [Dropped("tensor", name, f"not read as {everything.format}") for name in everything.unread_tensors]
    if plan:
        return ConvertReport(
            source.format, format, tensors_in, len(source.tensors()), (), None, tuple(dropped), (), (),
            _planned_bytes(source, cast_to), None, tuple(warnings),
        )  # fmt: skip
    if serve is not None:
        source, more = served(source, serve, cast_to)
        warnings += more
    with formats.staged(
        source, out, format=format, dtype=cast_to, overwrite=overwrite, inputs=inputs, base=known
    ) as written:
        try:
            result = formats.load(written.path, from_format=format, base=known, stored_names=source.stored_names)
        except LoraToolsError as error:
            raise RuntimeError(f"what was written as {format} could not be read back: {error}") from error
        checks = compare(whole, result, pieces, unwritable)
        _refuse_wrong(checks, whole, format)
        kept, recomputed, lost = _metadata(source, result)
        nbytes = sum(t.nbytes for t in result.tensors().values())
    return ConvertReport(
        source_format=source.format,
        target_format=format,
        tensors_in=tensors_in,
        tensors_out=len(result.tensors()),
        modules=tuple(checks),
        max_relative_error=max((c.error for c in checks), default=0.0),
        dropped=(*dropped, *(Dropped("metadata", name, f"{format} has no place for it") for name in lost)),
        kept=tuple(kept),
        recomputed=tuple(recomputed),
        bytes=nbytes,
        output=out,
        warnings=(*warnings, *written.warnings),
    )


def _matches(adapter: Adapter, base: Base | None) -> tuple[Matches | None, list[str]]:
    """What the adapter's names mean in the given base, or why that is not clear, as a warning."""
    if base is None or not base.shapes:
        return None, []
    try:
        return match(adapter, base.shapes, config=base.config), []
    except MismatchError as error:
        return None, [f"it is not clear whether the adapter fits {quoted(base.name)}: {error.message}"]


def _with_its_layers(base: Base | None, adapter: Adapter) -> Base | None:
    """The base as the adapter counts its layers, which may be repeated."""
    if base is None or not base.shapes or not adapter.layer_order:
        return base
    stack = stack_to_repeat(base.shapes, adapter.layer_order, base.name)
    return replace(base, shapes=with_repeated_layers(base.shapes, stack, adapter.layer_order))


def _renamed_pieces(
    whole: Adapter, pieces: Mapping[str, tuple[Piece, ...]], names: Mapping[str, str]
) -> dict[str, tuple[Piece, ...]]:
    """Where the modules of the source went, once those that the client calls otherwise have its names."""
    moved: dict[str, tuple[Piece, ...]] = {
        n: (Piece(names[n]),) for n in whole.updates if n in names and n not in pieces
    }
    moved |= {n: tuple(replace(p, module=names.get(p.module, p.module)) for p in of) for n, of in pieces.items()}
    return moved


def _without(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    if not names:
        return adapter
    return replace(
        adapter,
        updates={n: u for n, u in adapter.updates.items() if n not in names},
        replacements={n: r for n, r in adapter.replacements.items() if n not in names},
    )


def _refuse_wrong(checked: Sequence[ConvertedModule], source: Adapter, to: str) -> None:
    wrong = [c for c in checked if not c.explained]
    if wrong:
        _refuse_not_finite(source)
        lines = [f"{quoted(c.name)}: relative error {c.error:.3g}" for c in wrong]
        # Our own mistake, not the input's: nothing is committed.
        raise RuntimeError(
            f"what was written as {to} is not what was read, beyond rounding, in {len(wrong)} of {len(checked)} parts; "
            f"nothing was kept: {'; '.join(shown(lines))}"
        )


def _refuse_not_finite(source: Adapter) -> None:
    """Raise InputError where values are not finite: no comparison holds then, and the mistake is not ours."""
    bad = [
        quoted(name)
        for name, tensor in source.tensors().items()
        if tensor.dtype in FLOAT_DTYPES and not tensor.read().isfinite().all()
    ]
    if bad:
        raise InputError(
            f"{counted(len(bad), 'tensor')} of {quoted(source.name)} not finite: nan or infinity among the values",
            details=shown(bad),
            hint="the training run diverged; take an earlier checkpoint, or leave these out with --exclude",
        )


def _metadata(source: Adapter, result: Adapter) -> tuple[list[str], list[str], list[str]]:
    """Names of what the source said beside its tensors: kept, written anew, dropped."""
    said, says = records_of(source), records_of(result)
    kept = [name for name, value in said.items() if says.get(name) == value]
    recomputed = [name for name, value in said.items() if name in says and says[name] != value]
    return kept, recomputed, [name for name in said if name not in says]


def _shown_alphas(adapter: Adapter, names: Iterable[str]) -> str:
    alphas = {adapter.updates[n].alpha for n in names} - {None}
    return ", ".join(shown([f"{alpha:g}" for alpha in sorted(a for a in alphas if a is not None)]))


def _planned_bytes(adapter: Adapter, dtype: str | None) -> int:
    def stored(kind: str) -> str:
        return dtype if dtype is not None and kind in FLOAT_DTYPES else kind

    return sum(t.elements * DTYPE_BITS[stored(t.dtype)] // 8 for t in adapter.tensors().values())
