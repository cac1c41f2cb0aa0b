"""Text encoders of image models, with the names of transformers: CLIP, T5 and language models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

from loratools.errors import UnsupportedError
from loratools.naming.image.family import Family, Place, Rule, same
from loratools.short_repr import counted
from loratools.storage.files import quoted


def _clip() -> Iterator[Rule]:
    layer = "text_model.encoder.layers.{}"
    yield from same(*(f"{layer}.self_attn.{leaf}_proj" for leaf in ("q", "k", "v", "out")))
    yield from same(*(f"{layer}.{leaf}" for leaf in ("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2")))
    yield from same(*(f"text_model.embeddings.{kind}_embedding" for kind in ("token", "position")))
    yield from same("text_model.final_layer_norm", "text_projection")


def _t5() -> Iterator[Rule]:
    layer = "encoder.block.{}.layer"
    yield from same(*(f"{layer}.0.SelfAttention.{leaf}" for leaf in ("q", "k", "v", "o", "relative_attention_bias")))
    yield from same(*(f"{layer}.1.DenseReluDense.{leaf}" for leaf in ("wi", "wi_0", "wi_1", "wo")))
    yield from same(f"{layer}.{{}}.layer_norm", "shared", "encoder.embed_tokens", "encoder.final_layer_norm")


def _decoder() -> Iterator[Rule]:
    """Llama, Qwen, Gemma and their like."""
    for root in ("", "model.", "model.language_model."):
        layer = root + "layers.{}"
        yield from same(*(f"{layer}.self_attn.{leaf}_proj" for leaf in "qkvo"))
        yield from same(*(f"{layer}.self_attn.{leaf}_norm" for leaf in "qk"))
        yield from same(*(f"{layer}.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")))
        yield from same(*(f"{layer}.{leaf}_layernorm" for leaf in ("input", "post_attention")))
        yield from same(f"{root}embed_tokens", f"{root}norm")


def meanings(names: Iterable[str], *, flat: bool) -> dict[str, Place]:
    """What the names of one text encoder mean.

    Raises:
        UnsupportedError: No text encoder that is known here has them all.
    """
    names = list(names)
    for family in families():
        places = {name: place for name in names if (place := family.find(name, flat=flat)) is not None}
        if len(places) == len(names):
            return places
    raise UnsupportedError(
        f"no text encoder (CLIP, T5 or a language model) has all of its {counted(len(names), 'module name')}",
        details=[quoted(name) for name in names[:5]],
    )


@cache
def families() -> tuple[Family, ...]:
    rules_by_name = {"clip": _clip, "t5": _t5, "decoder": _decoder}
    return tuple(Family(name, "text_encoder", {"original": tuple(rules())}) for name, rules in rules_by_name.items())
