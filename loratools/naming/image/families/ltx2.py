"""LTX-2: video and sound in one model; its authors' names and those of diffusers.

Every block has one stream of each, and attention from each to the other. Later versions have gates on the attention and
a modulation of the text.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule, same

_VIDEO, _SOUND = ("attn1", "attn2"), ("audio_attn1", "audio_attn2")
# The video's stream is twice as wide as that of the sound, and heads are as wide as those of the sound.
_CROSSING = {"audio_to_video_attn": (1 / 2, 1, 2), "video_to_audio_attn": (1, 1 / 2, 1)}
_MODULATIONS = {
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}


def _rules() -> Iterator[Rule]:
    block = "transformer_blocks.{}"
    for attention in (*_VIDEO, *_SOUND, *_CROSSING):
        q, kv, out = _CROSSING.get(attention, (1, 1, 1))
        ratios = {"to_q": q, "to_k": kv, "to_v": kv, "to_out.0": out}
        for leaf, ratio in ratios.items():
            yield from same(f"{block}.{attention}.{leaf}", ratio=ratio)
        yield from same(f"{block}.{attention}.to_gate_logits")
        yield from (Rule(f"{block}.{attention}.{q}_norm", (f"{block}.{attention}.norm_{q}",)) for q in ("q", "k"))
    for stream in ("ff", "audio_ff"):
        yield from same(f"{block}.{stream}.net.0.proj", ratio=4)
        yield from same(f"{block}.{stream}.net.2", ratio=1 / 4)
    for sound in ("", "audio_"):
        yield Rule(f"{sound}patchify_proj", (f"{sound}proj_in",))
        yield from same(*(f"{sound}caption_projection.linear_{i}" for i in (1, 2)), f"{sound}proj_out")
    for original, diffusers in _MODULATIONS.items():
        for leaf in ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear"):
            yield Rule(f"{original}.{leaf}", (f"{diffusers}.{leaf}",))


_LEAVES = ("to_q", "to_k", "to_v")

FAMILY = Family(
    "ltx2",
    "transformer",
    {"original": tuple(_rules())},
    depths={"transformer_blocks": frozenset({48})},
    widths={
        **dict.fromkeys(
            (*(f"{{}}.{a}.{leaf}" for a in _VIDEO for leaf in _LEAVES), "{}.ff.net.0.proj"), frozenset({4096})
        ),
        **dict.fromkeys(
            (*(f"{a}.{leaf}" for a in _SOUND for leaf in _LEAVES), "audio_ff.net.0.proj"), frozenset({2048})
        ),
    },
    exclusive=(
        *(f"transformer_blocks.{{}}.{start}" for start in ("audio_", "video_to_audio_attn.")),
        *("patchify_proj", "audio_patchify_proj", "audio_proj_", "av_ca_", "av_cross_attn_"),
    ),
    classes=("LTX2VideoTransformer3DModel",),
    words=("ltx-2", "ltx2"),
)
