"""Queries and values of SAM's image encoder: trained apart, on rows of the one `qkv` that the model has of a block."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from loratools.adapter import Adapter
from loratools.formats.common.scale import at_scale
from loratools.tensors.joined import block_matrix
from loratools.updates.lora import LoRA

# In the order of SAMed's numbers, and the third of the rows of `qkv` that each is for.
THIRDS = {"q": 0, "v": 2}
_PART = re.compile(r"(?P<attention>image_encoder\.blocks\.(?P<block>\d+)\.attn)\.(?P<part>[qv])")


def part_name(block: int, part: str) -> str:
    """What the update of queries (`q`) or values (`v`) of a block is called; no module of the model has the name."""
    return f"image_encoder.blocks.{block}.attn.{part}"


def parse_part(name: str) -> tuple[int, str] | None:
    """The block and the part that an update is for."""
    parsed = _PART.fullmatch(name)
    return None if parsed is None else (int(parsed["block"]), parsed["part"])


def with_fused_blocks(adapter: Adapter) -> Adapter:
    """The adapter with queries and values as one update of `qkv`: A one below the other, B along a diagonal."""
    updates = dict(adapter.updates)
    blocks: dict[str, dict[str, LoRA]] = {}
    for name, update in adapter.updates.items():
        parsed, lora = _PART.fullmatch(name), update.as_lora()
        if parsed is not None and lora is not None and set(lora.parts) == {"A", "B"}:
            blocks.setdefault(parsed["attention"], {})[parsed["part"]] = lora
            del updates[name]
    updates |= {f"{attention}.qkv": _fused(attention, parts) for attention, parts in blocks.items()}
    return replace(adapter, updates=updates) if blocks else adapter


def with_same_blocks(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters, with the blocks of all fused where one has them so, as a conversion to PEFT leaves them."""
    fused = any(
        name.startswith("image_encoder.") and name.endswith(".attn.qkv") for a in adapters for name in a.updates
    )
    return [with_fused_blocks(adapter) for adapter in adapters] if fused else list(adapters)


def _fused(attention: str, parts: dict[str, LoRA]) -> LoRA:
    first = next(iter(parts.values()))
    level = {part: at_scale(f"{attention}.{part}", lora, first.scale) for part, lora in parts.items()}
    width, columns = first.shape[:2]
    rank = sum(lora.rank for lora in level.values())
    downs, ups, start = [], [], 0
    for part, lora in level.items():
        downs.append((start, 0, lora.a))
        ups.append((THIRDS[part] * width, start, lora.b))
        start += lora.rank
    a, b = block_matrix((rank, columns), downs), block_matrix((len("qkv") * width, rank), ups)
    return LoRA(a, b, first.scale * rank, first.alpha_source)
