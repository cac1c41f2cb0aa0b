"""AuraFlow, of which Pony 7 is one: the authors' names and those of diffusers."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule
from loratools.naming.image.parts.double_blocks import ADDED, QKV


def _rules() -> Iterator[Rule]:
    network = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
    block, target = "double_layers.{}", "joint_transformer_blocks.{}"
    for number, leaves in {2: (*QKV, "to_out.0"), 1: (*ADDED, "to_add_out")}.items():
        for letter, leaf in zip("qkvo", leaves, strict=True):
            yield Rule(f"{block}.attn.w{number}{letter}", (f"{target}.attn.{leaf}",), ratio=1)
    for a, b in {"mlpX": "ff", "mlpC": "ff_context"}.items():
        yield from (Rule(f"{block}.{a}.{c}", (f"{target}.{b}.{d}",)) for c, d in network.items())
    yield Rule(f"{block}.modX.1", (f"{target}.norm1.linear",), ratio=6)
    yield Rule(f"{block}.modC.1", (f"{target}.norm1_context.linear",), ratio=6)
    block, target = "single_layers.{}", "single_transformer_blocks.{}"
    for letter, leaf in zip("qkvo", (*QKV, "to_out.0"), strict=True):
        yield Rule(f"{block}.attn.w1{letter}", (f"{target}.attn.{leaf}",), ratio=1)
    yield from (Rule(f"{block}.mlp.{c}", (f"{target}.ff.{d}",)) for c, d in network.items())
    yield Rule(f"{block}.modCX.1", (f"{target}.norm1.linear",), ratio=6)
    outside = {
        "init_x_linear": "pos_embed.proj",
        "cond_seq_linear": "context_embedder",
        "t_embedder.mlp.0": "time_step_proj.linear_1",
        "t_embedder.mlp.2": "time_step_proj.linear_2",
        "final_linear": "proj_out",
    }
    yield from (Rule(a, (b,)) for a, b in outside.items())
    yield Rule("modF.1", ("norm_out.linear",), swap=True)


_BLOCK = (*(f"attn.{leaf}" for leaf in (*QKV, *ADDED)), *(f"ff.linear_{i}" for i in (1, 2)))

FAMILY = Family(
    "auraflow",
    "transformer",
    {"original": tuple(_rules())},
    depths={"joint_transformer_blocks": frozenset({4}), "single_transformer_blocks": frozenset({32})},
    widths=dict.fromkeys((*_BLOCK, "ff_context.linear_1", "ff_context.linear_2"), frozenset({3072})),
    exclusive=(
        *("double_layers.", "single_layers.", "joint_transformer_blocks."),
        *("single_transformer_blocks.{}.attn.to_out.0", "single_transformer_blocks.{}.ff.linear_"),
    ),
    classes=("AuraFlowTransformer2DModel",),
    words=("auraflow", "aura-flow", "pony-v7", "pony7"),
)
