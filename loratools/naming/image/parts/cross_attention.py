"""Attention of PixArt and Sana: fused to the image itself, and to the text with fused keys and values."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Rule


def cross_attention() -> Iterator[Rule]:
    """Both attentions of a block."""
    block, target = "blocks.{}", "transformer_blocks.{}"
    qkv = tuple(f"{target}.attn1.{leaf}" for leaf in ("to_q", "to_k", "to_v"))
    yield Rule(f"{block}.attn.qkv", qkv, split="thirds", ratio=3)
    yield Rule(f"{block}.attn.proj", (f"{target}.attn1.to_out.0",), ratio=1)
    yield Rule(f"{block}.cross_attn.q_linear", (f"{target}.attn2.to_q",), ratio=1)
    kv = tuple(f"{target}.attn2.{leaf}" for leaf in ("to_k", "to_v"))
    # Two equal parts.
    yield Rule(f"{block}.cross_attn.kv_linear", kv, split="thirds", ratio=2)
    yield Rule(f"{block}.cross_attn.proj", (f"{target}.attn2.to_out.0",), ratio=1)
