"""ACE-Step 1.5, for music: the names of its authors' checkpoint, as ComfyUI has them, and those of diffusers.

Its authors' adapters leave out `decoder.`: their names are then those of many language models, which no table here has.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule

_ATTENTIONS = ("self_attn", "cross_attn")
_NETWORK = ("gate_proj", "up_proj", "down_proj")


def _rules() -> Iterator[Rule]:
    block, target = "decoder.layers.{}", "layers.{}"
    # 16 heads of queries and 8 of keys and values.
    leaves = {"q_proj": ("to_q", 1.0), "k_proj": ("to_k", 0.5), "v_proj": ("to_v", 0.5), "o_proj": ("to_out.0", 1.0)}
    for attention in _ATTENTIONS:
        for a, (b, ratio) in leaves.items():
            yield Rule(f"{block}.{attention}.{a}", (f"{target}.{attention}.{b}",), ratio=ratio)
        yield from (Rule(f"{block}.{attention}.{q}_norm", (f"{target}.{attention}.norm_{q}",)) for q in ("q", "k"))
    yield from (Rule(f"{block}.mlp.{leaf}", (f"{target}.mlp.{leaf}",)) for leaf in _NETWORK)
    for embedder in ("time_embed", "time_embed_r"):
        for leaf in ("linear_1", "linear_2", "time_proj"):
            yield Rule(f"decoder.{embedder}.{leaf}", (f"{embedder}.{leaf}",))
    yield Rule("decoder.condition_embedder", ("condition_embedder",))
    yield Rule("decoder.proj_in.1", ("proj_in_conv",))
    yield Rule("decoder.proj_out.1", ("proj_out_conv",))


FAMILY = Family(
    "ace-step",
    "transformer",
    {"original": tuple(_rules())},
    depths={"layers": frozenset({24})},
    widths=dict.fromkeys(
        (*(f"{a}.{leaf}" for a in _ATTENTIONS for leaf in ("to_q", "to_k", "to_v")), "mlp.gate_proj", "mlp.up_proj"),
        frozenset({2048}),
    ),
    exclusive=(
        *("decoder.layers.{}.cross_attn.", "decoder.time_embed", "time_embed_r."),
        *(f"layers.{{}}.{a}.to_" for a in _ATTENTIONS),
    ),
    classes=("AceStepTransformer1DModel",),
    words=("ace-step", "acestep"),
)
