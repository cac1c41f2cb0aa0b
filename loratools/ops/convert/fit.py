"""Fit an adapter to a base that keeps projections fused where the adapter's base kept them apart, or the other way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from loratools.adapter import Adapter
from loratools.errors import MismatchError, UnsupportedError
from loratools.formats import Base
from loratools.formats.common.scale import at_scale, most_common
from loratools.naming.language.fused import Modules, fused_of, parts_of
from loratools.ops.convert.verify import Piece
from loratools.storage.files import quoted
from loratools.updates.lora import LoRA
from loratools.updates.parts.row_blocks import rows_of, stacked_rows


@dataclass(frozen=True)
class Fitted:
    """The adapter for this base, and where its modules went: those that are not in `pieces` kept their names."""

    adapter: Adapter
    pieces: Mapping[str, tuple[Piece, ...]]


def fitted(adapter: Adapter, base: Base | None) -> Fitted:
    """Split or join the modules that the base has under other names alone. Exact; the scale of a part may be folded.

    Raises:
        MismatchError: Rows that are not those of the base's parts.
    """
    if base is None or not base.shapes:
        return Fitted(adapter, {})
    modules = Modules(base.shapes)
    updates = dict(adapter.updates)
    pieces: dict[str, tuple[Piece, ...]] = {}
    joined: dict[str, dict[str, LoRA]] = {}
    for name, of_any_kind in adapter.updates.items():
        update = of_any_kind.as_lora()
        if update is None or update.mid is not None or len(update.a.shape) != 2:
            continue
        if update.magnitude_of == "in" and update.magnitude is not None:
            continue  # norms of columns are those of all rows together
        if not update.rank or modules.find(name) is not None:
            continue
        parts = parts_of(name)
        if parts and all(modules.find(part) for part in parts):
            del updates[name]
            split = _split(name, update, [(part, _rows(base, modules, part)) for part in parts])
            updates |= {part: u for part, (u, _) in split.items() if u.rank}
            pieces[name] = tuple(Piece(part, rows) for part, (u, rows) in split.items() if u.rank)
            continue
        for fused in fused_of(name):
            if modules.find(fused):
                joined.setdefault(fused, {})[name] = update
                break
    for fused, members in joined.items():
        for name in members:
            del updates[name]
        updates[fused], spans = _join(fused, members, _rows(base, modules, fused), base)
        pieces |= {name: (Piece(fused, None, rows),) for name, rows in spans.items()}
    return Fitted(replace(adapter, updates=updates) if pieces else adapter, pieces)


def _rows(base: Base, modules: Modules, module: str) -> int:
    return base.shapes[f"{modules.find(module)}.weight"][0]


def _split(name: str, update: LoRA, parts: list[tuple[str, int]]) -> dict[str, tuple[LoRA, tuple[int, int]]]:
    if sum(count for _, count in parts) != update.shape[0]:
        raise MismatchError(
            f"{quoted(name)} has {update.shape[0]} rows, and its parts in the base have {[c for _, c in parts]}"
        )
    parts_and_rows, start = {}, 0
    for part, count in parts:
        parts_and_rows[part] = rows_of(update, start, start + count), (start, start + count)
        start += count
    return parts_and_rows


def _join(fused: str, members: Mapping[str, LoRA], out: int, base: Base) -> tuple[LoRA, dict[str, tuple[int, int]]]:
    sizes = _part_sizes(fused, members, out, base)
    spans, start = {}, 0
    for part, count in sizes.items():
        spans[part] = (start, start + count)
        start += count
    scale = most_common(u.scale for u in members.values())
    parts = [(spans[name][0], at_scale(name, u, scale)) for name, u in members.items()]
    try:
        joined = stacked_rows(parts, out)
    except ValueError as error:
        raise UnsupportedError(
            f"{quoted(fused)} cannot be made of {', '.join(name.rpartition('.')[2] for name in members)}: {error}",
            hint="DoRA of some parts only has no fused form: merge it into the base, and extract a LoRA",
        ) from error
    return joined, {name: spans[name] for name in members}


def _part_sizes(fused: str, members: Mapping[str, LoRA], out: int, base: Base) -> dict[str, int]:
    """Rows of every part: of those in the adapter their own, of the others what the base's config leaves."""
    parts = parts_of(fused)
    sizes: dict[str, int | None] = {p: members[p].shape[0] if p in members else _rows_by_config(p, base) for p in parts}
    unknown = [part for part, size in sizes.items() if size is None]
    if len(unknown) == 1:
        sizes[unknown[0]] = out - sum(size for size in sizes.values() if size is not None)
    known_sizes = {part: size for part, size in sizes.items() if size is not None}
    if len(known_sizes) != len(parts) or sum(known_sizes.values()) != out or min(known_sizes.values()) <= 0:
        listing = ", ".join(f"{part.rpartition('.')[2]} {sizes[part] or 'unknown'}" for part in parts)
        raise MismatchError(
            f"the parts of {quoted(fused)} ({listing}) do not make the {out} rows that it has in the base"
        )
    return known_sizes


def _rows_by_config(part: str, base: Base) -> int | None:
    """Rows of a part by the base's config."""
    leaf = part.rpartition(".")[2]
    if leaf in ("gate_proj", "up_proj"):
        return base.whole_number("intermediate_size")
    heads = base.whole_number("num_attention_heads")
    hidden = base.whole_number("hidden_size")
    size = base.whole_number("head_dim") or (hidden // heads if hidden and heads else None)
    if heads is None or size is None:
        return None
    return size * (heads if leaf == "q_proj" else base.whole_number("num_key_value_heads") or heads)
