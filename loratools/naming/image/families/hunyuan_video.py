"""HunyuanVideo and FramePack: names of the authors, which musubi-tuner uses, of ComfyUI and of diffusers."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule

_QKV = ("to_q", "to_k", "to_v")
# How the authors and ComfyUI spell the parts in which they differ.
_AUTHORS = {"sep": "_", "lin": "linear", "0": "fc1", "2": "fc2", "in": "mlp.0", "out": "mlp.2", "first": "linear_1"}
_COMFY = {"sep": ".", "lin": "lin", "0": "0", "2": "2", "in": "in_layer", "out": "out_layer", "first": "in_layer"}


def _rules(spelled: dict[str, str]) -> Iterator[Rule]:
    sep, lin, fc1, fc2 = spelled["sep"], spelled["lin"], spelled["0"], spelled["2"]
    comfy = spelled is _COMFY
    double, single = "transformer_blocks.{}", "single_transformer_blocks.{}"
    added = ("add_q_proj", "add_k_proj", "add_v_proj")
    for a, qkv, out, ff, norm in (
        ("img", _QKV, "to_out.0", "ff", "norm1"),
        ("txt", added, "to_add_out", "ff_context", "norm1_context"),
    ):
        block = f"double_blocks.{{}}.{a}"
        yield Rule(f"{block}_attn{sep}qkv", tuple(f"{double}.attn.{leaf}" for leaf in qkv), split="thirds", ratio=3)
        yield Rule(f"{block}_attn{sep}proj", (f"{double}.attn.{out}",))
        for q in ("q", "k"):
            name = f"{block}_attn.norm.{'query' if q == 'q' else 'key'}_norm" if comfy else f"{block}_attn_{q}_norm"
            yield Rule(name, (f"{double}.attn.norm_{'added_' if a == 'txt' else ''}{q}",))
        yield Rule(f"{block}_mlp.{fc1}", (f"{double}.{ff}.net.0.proj",), ratio=4)
        yield Rule(f"{block}_mlp.{fc2}", (f"{double}.{ff}.net.2",), ratio=1 / 4)
        yield Rule(f"{block}_mod.{lin}", (f"{double}.{norm}.linear",), ratio=6)
    fused = (*(f"{single}.attn.{leaf}" for leaf in _QKV), f"{single}.proj_mlp")
    yield Rule("single_blocks.{}.linear1", fused, split="hidden", ratio=7)
    yield Rule("single_blocks.{}.linear2", (f"{single}.proj_out",), ratio=1 / 5)
    yield Rule(f"single_blocks.{{}}.modulation.{lin}", (f"{single}.norm.linear",))
    for q in ("q", "k"):
        name = f"norm.{'query' if q == 'q' else 'key'}_norm" if comfy else f"{q}_norm"
        yield Rule(f"single_blocks.{{}}.{name}", (f"{single}.attn.norm_{q}",))
    refiner = "txt_in.individual_token_refiner.blocks.{}"
    target = "context_embedder.token_refiner.refiner_blocks.{}"
    yield Rule(f"{refiner}.self_attn{sep}qkv", tuple(f"{target}.attn.{leaf}" for leaf in _QKV), split="thirds")
    yield Rule(f"{refiner}.self_attn{sep}proj", (f"{target}.attn.to_out.0",))
    yield Rule(f"{refiner}.mlp.{fc1}", (f"{target}.ff.net.0.proj",))
    yield Rule(f"{refiner}.mlp.{fc2}", (f"{target}.ff.net.2",))
    yield Rule(f"{refiner}.adaLN_modulation.1", (f"{target}.norm_out.linear",))
    yield from (Rule(f"{refiner}.{norm}", (f"{target}.{norm}",)) for norm in ("norm1", "norm2"))
    embedders = {
        "txt_in.t_embedder": "context_embedder.time_text_embed.timestep_embedder",
        "time_in": "time_text_embed.timestep_embedder",
        "guidance_in": "time_text_embed.guidance_embedder",
    }
    for a, b in embedders.items():
        yield Rule(f"{a}.{spelled['in']}", (f"{b}.linear_1",))
        yield Rule(f"{a}.{spelled['out']}", (f"{b}.linear_2",))
    yield Rule(f"txt_in.c_embedder.{spelled['first']}", ("context_embedder.time_text_embed.text_embedder.linear_1",))
    second = "out_layer" if comfy else "linear_2"
    yield Rule(f"txt_in.c_embedder.{second}", ("context_embedder.time_text_embed.text_embedder.linear_2",))
    yield Rule("txt_in.input_embedder", ("context_embedder.proj_in",))
    yield Rule("vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",))
    yield Rule("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",))
    yield Rule("img_in.proj", ("x_embedder.proj",))
    yield Rule("final_layer.linear", ("proj_out",))
    yield Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap=True)


_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_BLOCK = (*(f"attn.{leaf}" for leaf in (*_QKV, *_ADDED)), "ff.net.0.proj", "ff_context.net.0.proj", "proj_mlp")

FAMILY = Family(
    "hunyuan-video",
    "transformer",
    {"original": tuple(_rules(_AUTHORS)), "comfy": tuple(_rules(_COMFY))},
    depths={"transformer_blocks": frozenset({20}), "single_transformer_blocks": frozenset({40})},
    widths=dict.fromkeys(_BLOCK, frozenset({3072})),
    exclusive=(
        *(f"double_blocks.{{}}.{s}_attn_{leaf}" for s in ("img", "txt") for leaf in ("qkv", "proj")),
        "txt_in.individual_token_refiner.",
        "context_embedder.token_refiner.",
    ),
    classes=("HunyuanVideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel"),
    words=("hunyuan-video", "hunyuanvideo", "framepack", "hunyuan"),
)
