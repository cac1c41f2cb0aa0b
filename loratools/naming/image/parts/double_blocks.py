"""The blocks of Black Forest Labs: double ones, with a stream of the image and one of the text, and single ones."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Rule

QKV = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


def double_block() -> Iterator[Rule]:
    """The attention of a double block, which all generations of FLUX share."""
    block, target = "double_blocks.{}", "transformer_blocks.{}.attn"
    yield Rule(f"{block}.img_attn.qkv", tuple(f"{target}.{leaf}" for leaf in QKV), split="thirds", ratio=3)
    yield Rule(f"{block}.txt_attn.qkv", tuple(f"{target}.{leaf}" for leaf in ADDED), split="thirds", ratio=3)
    names = {
        "img_attn.proj": "to_out.0",
        "txt_attn.proj": "to_add_out",
        "img_attn.norm.query_norm": "norm_q",
        "img_attn.norm.key_norm": "norm_k",
        "txt_attn.norm.query_norm": "norm_added_q",
        "txt_attn.norm.key_norm": "norm_added_k",
    }
    for a, b in names.items():
        yield Rule(f"{block}.{a}", (f"{target}.{b}",), ratio=1 if a.endswith("proj") else None)


def attention_of_linear1() -> Iterator[Rule]:
    """The rule of `linear1_qkv`: the rows of `linear1` that are queries, keys and values, as ComfyUI reads them."""
    targets = tuple(f"single_transformer_blocks.{{}}.attn.{leaf}" for leaf in QKV)
    yield Rule("single_blocks.{}.linear1_qkv", targets, split="thirds", ratio=3)
