"""FLUX.1 and Chroma: Black Forest Labs' names, with fused projections, and those of diffusers.

Both projections of q, k and v are fused, and in the single blocks the first layer of the MLP with them. Chroma has the
blocks of FLUX.1 and one network in place of all modulations.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule, same
from loratools.naming.image.parts.double_blocks import ADDED, QKV, attention_of_linear1, double_block


def _rules() -> Iterator[Rule]:
    yield from double_block()
    double, single = "transformer_blocks.{}", "single_transformer_blocks.{}"
    for a, b in {"img": "ff", "txt": "ff_context"}.items():
        yield Rule(f"double_blocks.{{}}.{a}_mlp.0", (f"{double}.{b}.net.0.proj",), ratio=4)
        yield Rule(f"double_blocks.{{}}.{a}_mlp.2", (f"{double}.{b}.net.2",), ratio=1 / 4)
    yield Rule("double_blocks.{}.img_mod.lin", (f"{double}.norm1.linear",), ratio=6)
    yield Rule("double_blocks.{}.txt_mod.lin", (f"{double}.norm1_context.linear",), ratio=6)
    fused = (*(f"{single}.attn.{leaf}" for leaf in QKV), f"{single}.proj_mlp")
    yield Rule("single_blocks.{}.linear1", fused, split="hidden", ratio=7)
    yield Rule("single_blocks.{}.linear2", (f"{single}.proj_out",), ratio=1 / 5)
    yield Rule("single_blocks.{}.norm.query_norm", (f"{single}.attn.norm_q",))
    yield Rule("single_blocks.{}.norm.key_norm", (f"{single}.attn.norm_k",))
    yield Rule("single_blocks.{}.modulation.lin", (f"{single}.norm.linear",))
    yield from (Rule("img_in", ("x_embedder",)), Rule("txt_in", ("context_embedder",)))
    for a, b in {"time_in": "timestep", "vector_in": "text", "guidance_in": "guidance"}.items():
        yield Rule(f"{a}.in_layer", (f"time_text_embed.{b}_embedder.linear_1",))
        yield Rule(f"{a}.out_layer", (f"time_text_embed.{b}_embedder.linear_2",))
    yield Rule("final_layer.linear", ("proj_out",))
    yield Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap=True)
    yield from attention_of_linear1()
    # Chroma: one network in place of all modulations.
    guidance = "distilled_guidance_layer"
    yield from same(f"{guidance}.in_proj", f"{guidance}.out_proj")
    yield Rule(f"{guidance}.layers.{{}}.in_layer", (f"{guidance}.layers.{{}}.linear_1",))
    yield Rule(f"{guidance}.layers.{{}}.out_layer", (f"{guidance}.layers.{{}}.linear_2",))
    yield Rule(f"{guidance}.norms.{{}}", (f"{guidance}.norms.{{}}",))


_BLOCK = (*(f"attn.{leaf}" for leaf in (*QKV, *ADDED)), "ff.net.0.proj", "ff_context.net.0.proj", "proj_mlp")

FAMILY = Family(
    "flux",
    "transformer",
    {"original": tuple(_rules())},
    # 19 and 38 as published; 8 double blocks in the lighter models made from it.
    depths={"transformer_blocks": frozenset({19, 8}), "single_transformer_blocks": frozenset({38})},
    widths=dict.fromkeys(_BLOCK, frozenset({3072})),
    exclusive=("distilled_guidance_layer.",),
    classes=("FluxTransformer2DModel", "ChromaTransformer2DModel"),
    words=("flux", "chroma"),
)
