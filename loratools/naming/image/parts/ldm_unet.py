"""Stable Diffusion 1, 2 and XL: the UNet as LDM numbers it and as diffusers nests it.

input_blocks count the residual and the down-sampling blocks of all levels from 1, output_blocks from 0. A level has two
residual blocks on the way down and three on the way up. Podell et al., 2023, https://arxiv.org/abs/2307.01952, for XL.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Rule

_LAYERS = 2
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_BLOCK = (
    *("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"),
    *(f"{attention}.{leaf}" for attention in ("attn1", "attn2") for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
)
_OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
}
_LABELS = {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}


def _resnet(original: str, diffusers: str) -> Iterator[tuple[str, str]]:
    return ((f"{original}.{a}", f"{diffusers}.{b}") for a, b in _RESNET.items())


def _attention(original: str, diffusers: str, depth: int) -> Iterator[tuple[str, str]]:
    leaves = [
        "norm",
        "proj_in",
        "proj_out",
        *(f"transformer_blocks.{i}.{leaf}" for i in range(depth) for leaf in _BLOCK),
    ]
    return ((f"{original}.{leaf}", f"{diffusers}.{leaf}") for leaf in leaves)


def _names(depths: tuple[int, ...], middle: int, labels: bool) -> Iterator[tuple[str, str]]:
    """depths: transformer blocks in each attention of a level, from the top; 0 where it has no attention."""
    yield from (_OUTSIDE | (_LABELS if labels else {})).items()
    last = len(depths) - 1
    for level, depth in enumerate(depths):
        for i in range(_LAYERS):
            n = 1 + level * (_LAYERS + 1) + i
            yield from _resnet(f"input_blocks.{n}.0", f"down_blocks.{level}.resnets.{i}")
            yield from _attention(f"input_blocks.{n}.1", f"down_blocks.{level}.attentions.{i}", depth) if depth else ()
        if level != last:
            yield f"input_blocks.{(level + 1) * (_LAYERS + 1)}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
    yield from _resnet("middle_block.0", "mid_block.resnets.0")
    yield from _attention("middle_block.1", "mid_block.attentions.0", middle)
    yield from _resnet("middle_block.2", "mid_block.resnets.1")
    for level, depth in enumerate(reversed(depths)):
        for i in range(_LAYERS + 1):
            n = level * (_LAYERS + 1) + i
            yield from _resnet(f"output_blocks.{n}.0", f"up_blocks.{level}.resnets.{i}")
            yield from _attention(f"output_blocks.{n}.1", f"up_blocks.{level}.attentions.{i}", depth) if depth else ()
        if level != last:
            n = level * (_LAYERS + 1) + _LAYERS
            yield f"output_blocks.{n}.{2 if depth else 1}.conv", f"up_blocks.{level}.upsamplers.0.conv"


def unet_rules(depths: tuple[int, ...], middle: int, *, labels: bool) -> tuple[Rule, ...]:
    """Rules of a UNet.

    Args:
        depths: Transformer blocks in each attention of a level, from the top; 0 where it has no attention.
        middle: Transformer blocks in the middle.
        labels: Whether it has an embedding of labels beside that of the time.

    Returns:
        One rule for each module: LDM's name and that of diffusers.
    """
    return tuple(Rule(a, (b,)) for a, b in _names(depths, middle, labels))
