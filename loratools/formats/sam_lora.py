"""SAMed and Sam_LoRA: `w_a_000` and `w_b_000`, queries and values of each block of SAM's image encoder in turn.

https://github.com/hitachinsk/SAMed, https://github.com/MathieuNlp/Sam_LoRA. Block i has A and B of its queries at
2 i and of its values at 2 i + 1, added to the first and last third of `attn.qkv`; there is no alpha, and the scale is
1. Which blocks have any is an argument of the trainer that is stored nowhere; all of them is its default. Other tensors
are trained parts of the model.
"""

from __future__ import annotations

import re
from pathlib import Path

from loratools._version import __version__
from loratools.adapter import Adapter, Replacement
from loratools.errors import FormatError
from loratools.formats.common.base import Base
from loratools.formats.common.factor_pairs import paired
from loratools.formats.common.sam_blocks import THIRDS, parse_part, part_name
from loratools.formats.common.scale import at_rank, at_scale
from loratools.formats.common.source import AdapterSource, counted
from loratools.storage.casting import cast
from loratools.storage.files import quoted
from loratools.storage.ownership import MARK
from loratools.tensors.lazy import LazyTensor
from loratools.updates.lora import LoRA

WRITES = ".safetensors"

_FACTOR = re.compile(r"w_(?P<part>[ab])_(?P<number>\d{3})(\.weight)?")
_PARTS = tuple(THIRDS)


def detect(source: AdapterSource) -> bool:
    """By the names of its factors."""
    return source.container in ("pickle", "safetensors") and any(_FACTOR.fullmatch(name) for name in source.tensors)


def read(source: AdapterSource, *, rank_from: str | None = None) -> Adapter:
    """The adapter in `source`: an update for the queries and one for the values of each block.

    Raises:
        FormatError: Factors that are missing, or do not make products of one block.
    """
    parts: dict[str, dict[str, LazyTensor]] = {}
    replacements: dict[str, Replacement] = {}
    for name, tensor in source.tensors.items():
        parsed = _FACTOR.fullmatch(name)
        if parsed is None:
            replacements[name] = Replacement(tensor, "modules_to_save")
        else:
            parts.setdefault(parsed["number"], {})[f"w_{parsed['part']}"] = tensor
    pairs = paired(source, parts, "w_a", "w_b")
    if len(pairs) % 2 or list(pairs) != [f"{n:03d}" for n in range(len(pairs))]:
        raise FormatError(
            f"{quoted(source.file)} has {len(pairs)} pairs of factors up to {max(pairs)}; two for each block, "
            "one for queries and one for values, are needed"
        )
    updates: dict[str, LoRA] = {}
    for number, (a, b) in enumerate(pairs.values()):
        block, part = divmod(number, len(_PARTS))
        updates[part_name(block, _PARTS[part])] = LoRA(a, b, float(a.shape[0]), "metadata")
    blocks = len(updates) // len(_PARTS)
    for block in range(blocks):
        queries, values = (updates[part_name(block, part)] for part in _PARTS)
        if queries.shape != values.shape or queries.a.dtype != values.a.dtype or queries.b.dtype != values.b.dtype:
            raise FormatError(
                f"{quoted(source.file)} has queries and values of block {block} that do not fit each other"
            )
    return Adapter(
        updates,
        replacements,
        format="sam-lora",
        path=source.path,
        warnings=(
            f"the file does not say which blocks it is for; they are taken to be the first {blocks}, all of them",
        ),
    )


def unwritable(adapter: Adapter, *, base: Base | None = None) -> dict[str, str]:
    """What is not written, and why: all but LoRA of queries and values of the first blocks, without a gap."""
    problems: dict[str, str] = {}
    parts = {name: parsed for name in adapter.updates if (parsed := parse_part(name)) is not None}
    complete = {block for block, _ in parts.values() if all(part_name(block, part) in parts for part in _PARTS)}
    for name, update in adapter.updates.items():
        lora = update.as_lora()
        if name not in parts:
            problems[name] = "no queries or values of a block of SAM's image encoder"
        elif lora is None or set(lora.parts) != {"A", "B"}:
            problems[name] = f"{update.kind} of parts that SAMed has no name for"
        elif parts[name][0] not in complete or any(block not in complete for block in range(parts[name][0])):
            problems[name] = "of a block behind one without queries and values: SAMed numbers blocks without gaps"
    return problems


def write(adapter: Adapter, out: Path, *, dtype: str | None, base: Base | None = None) -> tuple[str, ...]:
    """Write the file that Sam_LoRA loads: one rank for all, no alpha. Equal input, equal bytes.

    Raises:
        UnsupportedError: Values that `dtype` cannot hold.
    """
    from loratools.storage.safetensors_writer import write_safetensors

    loras = {
        parsed: lora
        for name, update in adapter.updates.items()
        if (parsed := parse_part(name)) is not None and (lora := update.as_lora()) is not None
    }
    rank = max(lora.rank for lora in loras.values())
    stored = {name: cast(name, r.tensor, dtype) for name, r in adapter.replacements.items()}
    for (block, part), lora in loras.items():
        level = at_rank(at_scale(part_name(block, part), lora, 1.0, dtype), rank)
        number = len(_PARTS) * block + _PARTS.index(part)
        for name, tensor in ((f"w_a_{number:03d}", level.a), (f"w_b_{number:03d}", level.b)):
            stored[name] = cast(name, tensor, dtype)
    write_safetensors(out, dict(sorted(stored.items())), {"format": "pt", MARK: __version__})
    padded = sum(lora.rank != rank for lora in loras.values())
    return (
        (f"{counted(padded, 'module')} filled up with zeros to rank {rank}: SAMed has one for all",) if padded else ()
    )
