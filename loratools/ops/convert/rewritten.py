"""An adapter as its new format and its base have it: fused or apart, and under the names that its client looks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from loratools import formats
from loratools.adapter import Adapter
from loratools.checks.common.servers import taken_apart_for, unservable
from loratools.errors import MismatchError
from loratools.formats import Base
from loratools.formats.common.source import counted
from loratools.matching import Matches, match
from loratools.naming.language.repeated_layers import stack_to_repeat, with_repeated_layers
from loratools.ops.convert.client_names import ClientNames, named_for_client
from loratools.ops.convert.experts import packed, unpacked
from loratools.ops.convert.fit import fitted
from loratools.ops.convert.verify import Piece
from loratools.storage.files import quoted


@dataclass(frozen=True)
class Rewritten:
    """An adapter ready to be written, but for what the format cannot hold.

    Attributes:
        adapter: With the modules and names that the format's client has for them.
        original: What the result is compared with; its modules are the source's.
        pieces: Where the modules of `original` went; those that are not in it kept their names.
        unwritable: What cannot be written, by its name in `adapter`, and why.
        base: The base as the adapter counts its layers.
        warnings: What was done beyond copying.
    """

    adapter: Adapter
    original: Adapter
    pieces: Mapping[str, tuple[Piece, ...]]
    unwritable: Mapping[str, str]
    base: Base | None
    warnings: tuple[str, ...]


def rewritten(source: Adapter, format: str, base: Base | None, *, serve: str | None) -> Rewritten:
    """Work out how an adapter is written in another format.

    Args:
        source: The adapter, with a scale for every module.
        format: The format to write.
        base: The model that it is for, if one is given.
        serve: The server that is to load it, if one is named.

    Raises:
        UnsupportedError: The format has no names for its modules, or cannot repeat layers.
        MismatchError: The base has other parts of a fused module, or two names become one.
    """
    writer = formats.writer(format)
    source = formats.fitted_names(source, format)
    formats.ensure_layers(source, format if serve is None else serve)
    base = _with_its_layers(base, source)
    model_type = base.model_type if base is not None else None
    one_by_one = taken_apart_for(source, serve, model_type) if serve is not None else ()
    original = unpacked(source, [*writer.unwritable(source, base=base), *one_by_one], base, to=format)
    if format == "peft":
        original = packed(original, base)
    fit = fitted(original, base)
    matches, match_warnings = _matches(fit.adapter, base)
    named = named_for_client(fit.adapter, base, matches, format)
    unwritable = {**writer.unwritable(named.adapter, base=base), **named.unknown}
    new_names = {**named.updates, **named.replacements}
    for leftover in matches.leftovers if matches is not None else ():
        name = new_names.get(leftover.name, leftover.name)
        unwritable.setdefault(name, f"no place in the base: {leftover.described}")
    if serve is not None:
        unwritable |= unservable(named.adapter, serve, model_type)
    return Rewritten(
        adapter=named.adapter,
        # Replaced weights are renamed as a whole, and so are compared under their new names.
        original=replace(original, replacements=named.adapter.replacements),
        pieces=_renamed_pieces(original, fit.pieces, named.updates),
        unwritable=unwritable,
        base=base,
        warnings=(*_refit_warnings(original, fit.adapter), *match_warnings, *_renaming_warnings(named, format)),
    )


def _refit_warnings(original: Adapter, fit: Adapter) -> list[str]:
    count = sum(name not in fit.updates for name in original.updates)
    return [f"{counted(count, 'module')} split or joined, as the base has them"] if count else []


def _renaming_warnings(named: ClientNames, format: str) -> list[str]:
    renamed = {**named.updates, **named.replacements}
    if not renamed:
        return []
    old, new = min(renamed.items())
    client = "mlx-lm" if format == "mlx" else "the model"
    return [f"{counted(len(renamed), 'part')} renamed to what {client} calls them: {quoted(old)} is now {quoted(new)}"]


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
    original: Adapter, pieces: Mapping[str, tuple[Piece, ...]], names: Mapping[str, str]
) -> dict[str, tuple[Piece, ...]]:
    """Where the modules of the source went, once those that the client calls otherwise have its names."""
    renamed: dict[str, tuple[Piece, ...]] = {
        name: (Piece(names[name]),) for name in original.updates if name in names and name not in pieces
    }
    for name, parts in pieces.items():
        renamed[name] = tuple(replace(part, module=names.get(part.module, part.module)) for part in parts)
    return renamed
