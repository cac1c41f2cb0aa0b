"""Flux.1, Chroma and Flux.2: Black Forest Labs' names, with fused projections, and those of diffusers.

Of Flux.1, both projections of q, k and v are fused, and in the single blocks the first layer of the MLP with them.
Of Flux.2, diffusers keeps the single blocks as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from loratools.naming.image.families import Family, Rule, same

_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


def _double() -> Iterator[Rule]:
    """The parts of a double block that both generations share."""
    block, target = "double_blocks.{}", "transformer_blocks.{}.attn"
    yield Rule(f"{block}.img_attn.qkv", tuple(f"{target}.{leaf}" for leaf in _QKV), split="thirds")
    yield Rule(f"{block}.txt_attn.qkv", tuple(f"{target}.{leaf}" for leaf in _ADDED), split="thirds")
    names = {
        "img_attn.proj": "to_out.0",
        "txt_attn.proj": "to_add_out",
        "img_attn.norm.query_norm": "norm_q",
        "img_attn.norm.key_norm": "norm_k",
        "txt_attn.norm.query_norm": "norm_added_q",
        "txt_attn.norm.key_norm": "norm_added_k",
    }
    for a, b in names.items():
        yield Rule(f"{block}.{a}", (f"{target}.{b}",))


def _flux() -> Iterator[Rule]:
    yield from _double()
    double, single = "transformer_blocks.{}", "single_transformer_blocks.{}"
    for a, b in {"img": "ff", "txt": "ff_context"}.items():
        yield Rule(f"double_blocks.{{}}.{a}_mlp.0", (f"{double}.{b}.net.0.proj",), ratio=4)
        yield Rule(f"double_blocks.{{}}.{a}_mlp.2", (f"{double}.{b}.net.2",), ratio=1 / 4)
    yield Rule("double_blocks.{}.img_mod.lin", (f"{double}.norm1.linear",))
    yield Rule("double_blocks.{}.txt_mod.lin", (f"{double}.norm1_context.linear",))
    fused = (*(f"{single}.attn.{leaf}" for leaf in _QKV), f"{single}.proj_mlp")
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
    # Chroma: one network in place of all modulations.
    guidance = "distilled_guidance_layer"
    yield from same(f"{guidance}.in_proj", f"{guidance}.out_proj")
    yield Rule(f"{guidance}.layers.{{}}.in_layer", (f"{guidance}.layers.{{}}.linear_1",))
    yield Rule(f"{guidance}.layers.{{}}.out_layer", (f"{guidance}.layers.{{}}.linear_2",))
    yield Rule(f"{guidance}.norms.{{}}", (f"{guidance}.norms.{{}}",))


def _flux2() -> Iterator[Rule]:
    yield from _double()
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


def _depths(double: set[int], single: set[int]) -> dict[str, frozenset[int]]:
    return {"transformer_blocks": frozenset(double), "single_transformer_blocks": frozenset(single)}


@cache
def families() -> tuple[Family, ...]:
    return (
        Family("flux", "transformer", {"original": tuple(_flux())}, depths=_depths({19, 8}, {38})),
        Family("flux2", "transformer", {"original": tuple(_flux2())}, depths=_depths({8, 5}, {48, 24, 20})),
    )
