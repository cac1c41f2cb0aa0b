"""Wan 2.1 and 2.2, with VACE and Animate: the authors' names and those of diffusers."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule, same

_QKV = ("to_q", "to_k", "to_v")
_RESIDUAL_BLOCKS = 7
# What diffusers calls the parameter that scales and shifts the inputs of a block.
MODULATION_TABLE = "scale_shift_table"


def _rules() -> Iterator[Rule]:
    yield from _block("blocks.{}")
    outside = {
        "patch_embedding": "patch_embedding",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
        "head.head": "proj_out",
        "head.modulation": MODULATION_TABLE,
    }
    yield from (Rule(a, (b,)) for a, b in outside.items())
    yield from _vace()
    yield from _animate()


def _block(block: str) -> Iterator[Rule]:
    for a, b in {"self_attn": "attn1", "cross_attn": "attn2"}.items():
        leaves = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
        if b == "attn2":
            leaves |= {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
        for c, d in leaves.items():
            yield Rule(f"{block}.{a}.{c}", (f"{block}.{b}.{d}",), ratio=None if "norm" in c else 1)
    yield Rule(f"{block}.ffn.0", (f"{block}.ffn.net.0.proj",))
    yield Rule(f"{block}.ffn.2", (f"{block}.ffn.net.2",))
    yield Rule(f"{block}.norm3", (f"{block}.norm2",))
    # A parameter of the block, and no module.
    yield Rule(f"{block}.modulation", (f"{block}.{MODULATION_TABLE}",))


def _vace() -> Iterator[Rule]:
    """Blocks beside the others, of the video that is edited."""
    yield from _block("vace_blocks.{}")
    yield Rule("vace_blocks.{}.before_proj", ("vace_blocks.{}.proj_in",), ratio=1)
    yield Rule("vace_blocks.{}.after_proj", ("vace_blocks.{}.proj_out",), ratio=1)
    yield from same("vace_patch_embedding")


def _animate() -> Iterator[Rule]:
    """What brings the pose and the face of another video into the blocks."""
    yield from same("pose_patch_embedding", "face_encoder.out_proj")
    convolutions = ("conv1_local", "conv2", "conv3")
    yield from (Rule(f"face_encoder.{name}.conv", (f"face_encoder.{name}",)) for name in convolutions)
    block, target = "face_adapter.fuser_blocks.{}", "face_adapter.{}"
    yield Rule(f"{block}.linear1_q", (f"{target}.to_q",), ratio=1)
    # Two equal parts.
    yield Rule(f"{block}.linear1_kv", (f"{target}.to_k", f"{target}.to_v"), split="thirds", ratio=2)
    yield Rule(f"{block}.linear2", (f"{target}.to_out",), ratio=1)
    yield from (Rule(f"{block}.{q}_norm", (f"{target}.norm_{q}",)) for q in ("q", "k"))
    yield Rule("motion_encoder.enc.fc.{}", ("motion_encoder.motion_network.{}",))
    layers = "motion_encoder.enc.net_app.convs"
    yield Rule(f"{layers}.0.0", ("motion_encoder.conv_in",))
    yield Rule(f"{layers}.{_RESIDUAL_BLOCKS + 1}", ("motion_encoder.conv_out",))
    for i in range(_RESIDUAL_BLOCKS):
        for a, b in {"conv1.0": "conv1", "conv2.1": "conv2", "skip.1": "conv_skip"}.items():
            yield Rule(f"{layers}.{i + 1}.{a}", (f"motion_encoder.res_blocks.{i}.{b}",))


FAMILY = Family(
    "wan",
    "transformer",
    {"original": tuple(_rules())},
    # 1.3B and 5B, 14B; of VACE 1.3B and 14B.
    depths={"blocks": frozenset({30, 40}), "vace_blocks": frozenset({15, 8}), "face_adapter": frozenset({8})},
    widths=dict.fromkeys(
        (*(f"attn{i}.{leaf}" for i in (1, 2) for leaf in _QKV), "ffn.net.0.proj"), frozenset({1536, 3072, 5120})
    ),
    exclusive=(
        *(f"blocks.{{}}.{part}.{leaf}" for part in ("self_attn", "cross_attn") for leaf in ("q", "k", "v", "o")),
        *(f"blocks.{{}}.attn{i}.{leaf}" for i in (1, 2) for leaf in _QKV),
        *("blocks.{}.ffn.0", "blocks.{}.ffn.net."),
        *("condition_embedder.", "vace_", "face_adapter.", "face_encoder.", "motion_encoder."),
    ),
    classes=(
        *("WanTransformer3DModel", "WanVACETransformer3DModel", "WanAnimateTransformer3DModel"),
        *("SkyReelsV2Transformer3DModel", "ChronoEditTransformer3DModel"),
    ),
    words=("wan", "skyreels-v2"),
    second=True,
)
