"""Blocks of Tencent's Hunyuan transformers for images and videos, in the spellings of their authors and of ComfyUI.

Double blocks have a stream of the image and one of the text. The authors published the projections of queries, keys and
values fused (HunyuanVideo) or apart (HunyuanVideo 1.5, HunyuanImage 2.1), ComfyUI has them fused in all models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loratools.naming.image.family import Rule
from loratools.naming.image.parts.double_blocks import ADDED, QKV

# The ends of diffusers' names of what reads the stream of the image, or of the text.
BLOCK = (*(f"attn.{leaf}" for leaf in (*QKV, *ADDED)), "ff.net.0.proj", "ff_context.net.0.proj", "proj_mlp")
_DOUBLE, _SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
_STREAMS = (("img", QKV, "to_out.0", "ff", "norm1"), ("txt", ADDED, "to_add_out", "ff_context", "norm1_context"))


@dataclass(frozen=True)
class Spelling:
    """How one program spells the parts in which they differ.

    separator       between `img_attn` and `qkv`
    modulation      the layer of a modulation
    mlp             the two layers of a feed-forward network
    embedder        the two layers of an embedder of numbers
    text_embedder   the two layers of the embedder of the pooled text
    norms_inside    whether the norms of queries and keys are in a module of their own
    """

    separator: str
    modulation: str
    mlp: tuple[str, str]
    embedder: tuple[str, str]
    text_embedder: tuple[str, str]
    norms_inside: bool


AUTHORS = Spelling("_", "linear", ("fc1", "fc2"), ("mlp.0", "mlp.2"), ("linear_1", "linear_2"), norms_inside=False)
COMFY = Spelling(".", "lin", ("0", "2"), ("in_layer", "out_layer"), ("in_layer", "out_layer"), norms_inside=True)


def double_blocks(spelling: Spelling, *, apart: bool = False) -> Iterator[Rule]:
    """The double blocks. apart: queries, keys and values are modules of their own."""
    for stream, qkv, out, ff, norm in _STREAMS:
        block = f"double_blocks.{{}}.{stream}"
        attention = f"{block}_attn{spelling.separator}"
        if apart:
            yield from projections_apart(stream)
        else:
            yield Rule(f"{attention}qkv", tuple(f"{_DOUBLE}.attn.{leaf}" for leaf in qkv), split="thirds", ratio=3)
        yield Rule(f"{attention}proj", (f"{_DOUBLE}.attn.{out}",), ratio=1)
        for q in ("query", "key"):
            name = f"{attention}norm.{q}_norm" if spelling.norms_inside else f"{attention}{q[0]}_norm"
            yield Rule(name, (f"{_DOUBLE}.attn.norm_{'added_' if stream == 'txt' else ''}{q[0]}",))
        yield Rule(f"{block}_mlp.{spelling.mlp[0]}", (f"{_DOUBLE}.{ff}.net.0.proj",), ratio=4)
        yield Rule(f"{block}_mlp.{spelling.mlp[1]}", (f"{_DOUBLE}.{ff}.net.2",), ratio=1 / 4)
        yield Rule(f"{block}_mod.{spelling.modulation}", (f"{_DOUBLE}.{norm}.linear",), ratio=6)


def projections_apart(stream: str) -> Iterator[Rule]:
    """Queries, keys and values of one stream of a double block (`img` or `txt`), each a module."""
    qkv = next(leaves for name, leaves, *_ in _STREAMS if name == stream)
    for letter, leaf in zip("qkv", qkv, strict=True):
        yield Rule(f"double_blocks.{{}}.{stream}_attn_{letter}", (f"{_DOUBLE}.attn.{leaf}",), ratio=1)


def single_blocks(spelling: Spelling) -> Iterator[Rule]:
    """The single blocks, where queries, keys, values and the first layer of the MLP are one module."""
    fused = (*(f"{_SINGLE}.attn.{leaf}" for leaf in QKV), f"{_SINGLE}.proj_mlp")
    yield Rule("single_blocks.{}.linear1", fused, split="hidden", ratio=7)
    yield Rule("single_blocks.{}.linear2", (f"{_SINGLE}.proj_out",), ratio=1 / 5)
    yield Rule(f"single_blocks.{{}}.modulation.{spelling.modulation}", (f"{_SINGLE}.norm.linear",), ratio=3)
    for q in ("query", "key"):
        name = f"norm.{q}_norm" if spelling.norms_inside else f"{q[0]}_norm"
        yield Rule(f"single_blocks.{{}}.{name}", (f"{_SINGLE}.attn.norm_{q[0]}",))


def single_blocks_apart() -> Iterator[Rule]:
    """The parts of `linear1` as modules of their own, and `linear2` around one layer."""
    for letter, leaf in zip("qkv", QKV, strict=True):
        yield Rule(f"single_blocks.{{}}.linear1_{letter}", (f"{_SINGLE}.attn.{leaf}",), ratio=1)
    yield Rule("single_blocks.{}.linear1_mlp", (f"{_SINGLE}.proj_mlp",), ratio=4)
    yield Rule("single_blocks.{}.linear2.fc", (f"{_SINGLE}.proj_out",), ratio=1 / 5)


def text_refiner(spelling: Spelling) -> Iterator[Rule]:
    """The refiner of the text's tokens, and what embeds its time and the text as a whole."""
    refiner = "txt_in.individual_token_refiner.blocks.{}"
    target = "context_embedder.token_refiner.refiner_blocks.{}"
    attention = f"{refiner}.self_attn{spelling.separator}"
    yield Rule(f"{attention}qkv", tuple(f"{target}.attn.{leaf}" for leaf in QKV), split="thirds", ratio=3)
    yield Rule(f"{attention}proj", (f"{target}.attn.to_out.0",))
    yield Rule(f"{refiner}.mlp.{spelling.mlp[0]}", (f"{target}.ff.net.0.proj",))
    yield Rule(f"{refiner}.mlp.{spelling.mlp[1]}", (f"{target}.ff.net.2",))
    yield Rule(f"{refiner}.adaLN_modulation.1", (f"{target}.norm_out.linear",))
    yield from (Rule(f"{refiner}.{norm}", (f"{target}.{norm}",)) for norm in ("norm1", "norm2"))
    embed = "context_embedder.time_text_embed"
    yield from embedder(spelling, "txt_in.t_embedder", f"{embed}.timestep_embedder")
    for layer, number in zip(spelling.text_embedder, (1, 2), strict=True):
        yield Rule(f"txt_in.c_embedder.{layer}", (f"{embed}.text_embedder.linear_{number}",))
    yield Rule("txt_in.input_embedder", ("context_embedder.proj_in",))


def embedder(spelling: Spelling, original: str, diffusers: str) -> Iterator[Rule]:
    """The two layers that embed a number: a time, or the strength of the guidance."""
    for layer, number in zip(spelling.embedder, (1, 2), strict=True):
        yield Rule(f"{original}.{layer}", (f"{diffusers}.linear_{number}",))


def glyphs() -> Iterator[Rule]:
    """The second embedder of the text, for its letters, as HunyuanVideo 1.5 and HunyuanImage 2.1 have it."""
    yield Rule("byt5_in.layernorm", ("context_embedder_2.norm",))
    yield from (Rule(f"byt5_in.fc{i}", (f"context_embedder_2.linear_{i}",)) for i in (1, 2, 3))


def ends() -> Iterator[Rule]:
    """What embeds the latents, and what makes them of the last hidden states."""
    yield Rule("img_in.proj", ("x_embedder.proj",))
    yield Rule("final_layer.linear", ("proj_out",))
    yield Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap=True)
