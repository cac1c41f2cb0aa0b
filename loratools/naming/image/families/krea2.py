"""Krea 2: its authors' names and those of diffusers."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule


def _rules() -> Iterator[Rule]:
    attention = {"wq": "to_q", "wk": "to_k", "wv": "to_v", "wo": "to_out.0", "gate": "to_gate"}
    leaves = {f"attn.{a}": f"attn.{b}" for a, b in attention.items()}
    leaves |= {f"mlp.{leaf}": f"ff.{leaf}" for leaf in ("gate", "up", "down")}
    blocks = {
        "blocks.{}": "transformer_blocks.{}",
        "txtfusion.layerwise_blocks.{}": "text_fusion.layerwise_blocks.{}",
        "txtfusion.refiner_blocks.{}": "text_fusion.refiner_blocks.{}",
    }
    for a, b in blocks.items():
        # Of the text there are as many keys as queries; of the image a quarter.
        grouped = 1 / 4 if a == "blocks.{}" else 1
        ratios = {"attn.wq": 1, "attn.wk": grouped, "attn.wv": grouped, "attn.wo": 1, "attn.gate": 1}
        yield from (Rule(f"{a}.{c}", (f"{b}.{d}",), ratio=ratios.get(c)) for c, d in leaves.items())
    outside = {
        "first": "img_in",
        "last.linear": "final_layer.linear",
        "tmlp.0": "time_embed.linear_1",
        "tmlp.2": "time_embed.linear_2",
        "tproj.1": "time_mod_proj",
        "txtmlp.1": "txt_in.linear_1",
        "txtmlp.3": "txt_in.linear_2",
        "txtfusion.projector": "text_fusion.projector",
    }
    yield from (Rule(a, (b,)) for a, b in outside.items())


FAMILY = Family(
    "krea2",
    "transformer",
    {"original": tuple(_rules())},
    depths={"transformer_blocks": frozenset({28})},
    widths={
        f"transformer_blocks.{{}}.{leaf}": frozenset({6144})
        for leaf in ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_gate", "ff.gate", "ff.up")
    },
    exclusive=(
        *(f"blocks.{{}}.attn.{leaf}" for leaf in ("wq", "wk", "wv", "wo")),
        *("txtfusion.", "text_fusion.", "transformer_blocks.{}.attn.to_gate"),
    ),
    classes=("Krea2Transformer2DModel",),
    words=("krea2", "krea-2"),
)
