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
    # Without ratios: heads of XL are wider together than its blocks.
    leaves = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "to_out.0"}
    for attention in _ATTENTIONS:
        yield from (Rule(f"{block}.{attention}.{a}", (f"{target}.{attention}.{b}",)) for a, b in leaves.items())
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
    # 1.5 and its XL.
    depths={"layers": frozenset({24, 32})},
    widths=dict.fromkeys(
        (*(f"{a}.{leaf}" for a in _ATTENTIONS for leaf in ("to_q", "to_k", "to_v")), "mlp.gate_proj", "mlp.up_proj"),
        frozenset({2048, 2560}),
    ),
    exclusive=(
        *("decoder.layers.{}.cross_attn.", "decoder.time_embed", "time_embed_r."),
        *(f"layers.{{}}.{a}.to_" for a in _ATTENTIONS),
    ),
    classes=("AceStepTransformer1DModel",),
    words=("ace-step", "acestep"),
)
