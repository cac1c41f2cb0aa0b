"""HunyuanDiT: the authors' names, with fused projections, and those of diffusers."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule, same

_LEAVES = ("to_q", "to_k", "to_v")


def _rules() -> Iterator[Rule]:
    block = "blocks.{}"
    qkv = tuple(f"{block}.attn1.{leaf}" for leaf in _LEAVES)
    yield Rule(f"{block}.attn1.Wqkv", qkv, split="thirds", ratio=3)
    yield Rule(f"{block}.attn2.q_proj", (f"{block}.attn2.to_q",), ratio=1)
    # Two equal parts, of the text, which is narrower.
    yield Rule(f"{block}.attn2.kv_proj", (f"{block}.attn2.to_k", f"{block}.attn2.to_v"), split="thirds")
    for attention in ("attn1", "attn2"):
        yield Rule(f"{block}.{attention}.out_proj", (f"{block}.{attention}.to_out.0",), ratio=1)
        yield from (Rule(f"{block}.{attention}.{q}_norm", (f"{block}.{attention}.norm_{q}",)) for q in ("q", "k"))
    yield Rule(f"{block}.mlp.fc1", (f"{block}.ff.net.0.proj",))
    yield Rule(f"{block}.mlp.fc2", (f"{block}.ff.net.2",))
    yield Rule(f"{block}.default_modulation.1", (f"{block}.norm1.linear",), ratio=1)
    yield from same(f"{block}.skip_linear", ratio=1 / 2)
    outside = {
        "x_embedder.proj": "pos_embed.proj",
        "mlp_t5.0": "text_embedder.linear_1",
        "mlp_t5.2": "text_embedder.linear_2",
        "t_embedder.mlp.0": "time_extra_emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_extra_emb.timestep_embedder.linear_2",
        "extra_embedder.0": "time_extra_emb.extra_embedder.linear_1",
        "extra_embedder.2": "time_extra_emb.extra_embedder.linear_2",
        "final_layer.linear": "proj_out",
    }
    yield from (Rule(a, (b,)) for a, b in outside.items())
    yield from (Rule(f"pooler.{leaf}", (f"time_extra_emb.pooler.{leaf}",)) for leaf in ("q_proj", "k_proj", "v_proj"))
    yield Rule("pooler.c_proj", ("time_extra_emb.pooler.c_proj",))
    yield Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap=True)


FAMILY = Family(
    "hunyuan-dit",
    "transformer",
    {"original": tuple(_rules())},
    depths={"blocks": frozenset({40})},
    widths={
        **dict.fromkeys((*(f"attn1.{leaf}" for leaf in _LEAVES), "attn2.to_q", "ff.net.0.proj"), frozenset({1408})),
        **dict.fromkeys(("attn2.to_k", "attn2.to_v"), frozenset({1024})),
    },
    exclusive=("blocks.{}.attn1.Wqkv", "blocks.{}.attn2.kv_proj", "blocks.{}.default_modulation.", "blocks.{}.skip_"),
    classes=("HunyuanDiT2DModel",),
    words=("hunyuan-dit", "hunyuandit"),
)
