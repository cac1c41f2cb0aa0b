"""Cosmos Predict 2 and Anima, which has its blocks: the authors' names and those of diffusers.

Checkpoints of Cosmos have `net.` before all names. Anima's adapter between text encoders is a model of its own in
diffusers, and in no table here.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule, same

_NORMS = {"self_attn": "norm1", "cross_attn": "norm2", "mlp": "norm3"}
_ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}


def _rules() -> Iterator[Rule]:
    block, target = "blocks.{}", "transformer_blocks.{}"
    leaves = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "output_proj": "to_out.0"}
    for a, b in _ATTENTIONS.items():
        for c, d in leaves.items():
            # The text is narrower than the image: its keys and values have other inputs than outputs.
            square = b == "attn1" or c in ("q_proj", "output_proj")
            yield Rule(f"{block}.{a}.{c}", (f"{target}.{b}.{d}",), ratio=1 if square else None)
        yield from (Rule(f"{block}.{a}.{q}_norm", (f"{target}.{b}.norm_{q}",)) for q in ("q", "k"))
    yield Rule(f"{block}.mlp.layer1", (f"{target}.ff.net.0.proj",), ratio=4)
    yield Rule(f"{block}.mlp.layer2", (f"{target}.ff.net.2",), ratio=1 / 4)
    for a, b in _NORMS.items():
        yield from (Rule(f"{block}.adaln_modulation_{a}.{i}", (f"{target}.{b}.linear_{i}",)) for i in (1, 2))
    yield Rule("x_embedder.proj.1", ("patch_embed.proj",))
    yield from (Rule(f"t_embedder.1.linear_{i}", (f"time_embed.t_embedder.linear_{i}",)) for i in (1, 2))
    yield Rule("t_embedding_norm", ("time_embed.norm",))
    yield from (Rule(f"final_layer.adaln_modulation.{i}", (f"norm_out.linear_{i}",)) for i in (1, 2))
    yield Rule("final_layer.linear", ("proj_out",))
    yield from same("crossattn_proj.0")


FAMILY = Family(
    "cosmos",
    "transformer",
    {"original": tuple(_rules())},
    # 2B, as Anima is, and 14B.
    depths={"transformer_blocks": frozenset({28, 36})},
    widths={
        **dict.fromkeys(
            (*(f"attn1.{leaf}" for leaf in ("to_q", "to_k", "to_v")), "attn2.to_q", "ff.net.0.proj"),
            frozenset({2048, 5120}),
        ),
        **dict.fromkeys(("attn2.to_k", "attn2.to_v"), frozenset({1024})),
    },
    exclusive=(
        *(f"blocks.{{}}.{a}.{leaf}" for a in _ATTENTIONS for leaf in ("q_proj", "k_proj", "v_proj", "output_proj")),
        *("blocks.{}.mlp.layer", "blocks.{}.adaln_modulation_"),
        *(f"transformer_blocks.{{}}.{norm}.linear_" for norm in _NORMS.values()),
    ),
    classes=("CosmosTransformer3DModel",),
    words=("cosmos", "anima"),
)
