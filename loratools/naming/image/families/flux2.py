"""FLUX.2 (dev and klein): Black Forest Labs' names, and those of diffusers, which keeps the single blocks fused."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule
from loratools.naming.image.parts.double_blocks import ADDED, QKV, double_block


def _rules() -> Iterator[Rule]:
    yield from double_block()
    for a, b in {"img": "ff", "txt": "ff_context"}.items():
        yield Rule(f"double_blocks.{{}}.{a}_mlp.0", (f"transformer_blocks.{{}}.{b}.linear_in",), ratio=6)
        yield Rule(f"double_blocks.{{}}.{a}_mlp.2", (f"transformer_blocks.{{}}.{b}.linear_out",), ratio=1 / 3)
    single = "single_transformer_blocks.{}.attn"
    yield Rule("single_blocks.{}.linear1", (f"{single}.to_qkv_mlp_proj",), ratio=9)
    yield Rule("single_blocks.{}.linear2", (f"{single}.to_out",), ratio=1 / 4)
    yield Rule("single_blocks.{}.norm.query_norm", (f"{single}.norm_q",))
    yield Rule("single_blocks.{}.norm.key_norm", (f"{single}.norm_k",))
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        yield Rule(f"{name}.lin", (f"{name}.linear",))
    yield from (Rule("img_in", ("x_embedder",)), Rule("txt_in", ("context_embedder",)))
    for a, b in {"time_in": "timestep", "guidance_in": "guidance"}.items():
        yield Rule(f"{a}.in_layer", (f"time_guidance_embed.{b}_embedder.linear_1",))
        yield Rule(f"{a}.out_layer", (f"time_guidance_embed.{b}_embedder.linear_2",))
    yield Rule("final_layer.linear", ("proj_out",))
    yield Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap=True)


def _fused() -> Iterator[Rule]:
    """Projections of diffusers' own that it fuses on demand, as for a LoKr of them, which cannot be cut."""
    attention = "transformer_blocks.{}.attn"
    for fused, parts in {"to_qkv": QKV, "to_added_qkv": ADDED}.items():
        yield Rule(f"{attention}.{fused}", tuple(f"{attention}.{leaf}" for leaf in parts), split="thirds", ratio=3)


_BLOCK = (*(f"attn.{leaf}" for leaf in (*QKV, *ADDED)), "ff.linear_in", "ff_context.linear_in", "attn.to_qkv_mlp_proj")

FAMILY = Family(
    "flux2",
    "transformer",
    {"original": tuple(_rules())},
    fused=tuple(_fused()),
    # dev, klein 9B and klein 4B.
    depths={"transformer_blocks": frozenset({8, 5}), "single_transformer_blocks": frozenset({48, 24, 20})},
    widths=dict.fromkeys(_BLOCK, frozenset({6144, 4096, 3072})),
    exclusive=("double_stream_modulation_", "single_stream_modulation."),
    classes=("Flux2Transformer2DModel",),
    words=("flux-2", "flux2"),
)
