"""Further diffusion transformers: Qwen-Image, Z-Image, Lumina 2 and Krea 2."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from loratools.naming.image.families import Family, Rule, same

_QKV = ("to_q", "to_k", "to_v")


def _qwen_image() -> Iterator[Rule]:
    """Published with the names of diffusers."""
    attention = (*_QKV, "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    norms = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    block = "transformer_blocks.{}"
    yield from same(*(f"{block}.attn.{leaf}" for leaf in (*attention, *norms)))
    for stream in ("img", "txt"):
        yield from same(f"{block}.{stream}_mlp.net.0.proj", f"{block}.{stream}_mlp.net.2", f"{block}.{stream}_mod.1")
    yield from same("img_in", "txt_in", "txt_norm", "norm_out.linear", "proj_out")
    yield from same(*(f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2)))


def _z_image() -> Iterator[Rule]:
    for stage in ("layers", "noise_refiner", "context_refiner"):
        block = f"{stage}.{{}}"
        attention = f"{block}.attention"
        yield Rule(f"{attention}.qkv", tuple(f"{attention}.{leaf}" for leaf in _QKV), split="thirds")
        yield Rule(f"{attention}.out", (f"{attention}.to_out.0",))
        yield from (Rule(f"{attention}.{q}_norm", (f"{attention}.norm_{q}",)) for q in ("q", "k"))
        yield from same(*(f"{block}.feed_forward.w{i}" for i in (1, 2, 3)))
        yield from same(*(f"{block}.{norm}{i}" for norm in ("attention_norm", "ffn_norm") for i in (1, 2)))
        yield from same(f"{block}.adaLN_modulation.0")
    yield from same("cap_embedder.0", "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")
    # The patch size is in the name: 2 pixels, 1 frame.
    yield Rule("x_embedder", ("all_x_embedder.2-1",))
    yield Rule("final_layer.linear", ("all_final_layer.2-1.linear",))
    yield Rule("final_layer.adaLN_modulation.1", ("all_final_layer.2-1.adaLN_modulation.1",))


def _lumina2() -> Iterator[Rule]:
    for stage in ("layers", "noise_refiner", "context_refiner"):
        block = f"{stage}.{{}}"
        yield Rule(f"{block}.attention.qkv", tuple(f"{block}.attn.{leaf}" for leaf in _QKV), split="grouped")
        yield Rule(f"{block}.attention.out", (f"{block}.attn.to_out.0",))
        yield from (Rule(f"{block}.attention.{q}_norm", (f"{block}.attn.norm_{q}",)) for q in ("q", "k"))
        yield from (Rule(f"{block}.feed_forward.w{i}", (f"{block}.feed_forward.linear_{i}",)) for i in (1, 2, 3))
        if stage != "context_refiner":
            yield Rule(f"{block}.adaLN_modulation.1", (f"{block}.norm1.linear",))
    yield from same("x_embedder")
    for i, j in ((0, 1), (2, 2)):
        yield Rule(f"t_embedder.mlp.{i}", (f"time_caption_embed.timestep_embedder.linear_{j}",))
    yield from (Rule(f"cap_embedder.{i}", (f"time_caption_embed.caption_embedder.{i}",)) for i in (0, 1))
    yield Rule("final_layer.adaLN_modulation.1", ("norm_out.linear_1",))
    yield Rule("final_layer.linear", ("norm_out.linear_2",))


def _krea2() -> Iterator[Rule]:
    attention = {"wq": "to_q", "wk": "to_k", "wv": "to_v", "wo": "to_out.0", "gate": "to_gate"}
    leaves = {f"attn.{a}": f"attn.{b}" for a, b in attention.items()}
    leaves |= {f"mlp.{leaf}": f"ff.{leaf}" for leaf in ("gate", "up", "down")}
    blocks = {
        "blocks.{}": "transformer_blocks.{}",
        "txtfusion.layerwise_blocks.{}": "text_fusion.layerwise_blocks.{}",
        "txtfusion.refiner_blocks.{}": "text_fusion.refiner_blocks.{}",
    }
    for a, b in blocks.items():
        yield from (Rule(f"{a}.{c}", (f"{b}.{d}",)) for c, d in leaves.items())
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


@cache
def families() -> tuple[Family, ...]:
    """musubi-tuner trains Qwen-Image and Z-Image with the names of diffusers."""
    return (
        Family("qwen-image", "transformer", {"original": tuple(_qwen_image())}, kohya="diffusers"),
        Family("z-image", "transformer", {"original": tuple(_z_image())}, kohya="diffusers"),
        Family("lumina2", "transformer", {"original": tuple(_lumina2())}),
        Family("krea2", "transformer", {"original": tuple(_krea2())}),
    )
