"""Weights that are absent on disk because they follow a stored one.

transformers saves a shared weight once, under the name it follows, and ties the others again when it loads. Which
name is absent is known by model, and is a table here; whether it is tied is what the config says.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

# Architectures with a head that gives tokens; any other (BertModel, LlamaForSequenceClassification) has none to tie.
_HAS_HEAD = re.compile(
    r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|ForMaskedLM|ForPreTraining|DoubleHeadsModel"
    r"|ForSpeechSeq2Seq|LMHead|MTModel|ForImageTextToText|ForQuestionGeneration)$"
)


class _Head(NamedTuple):
    absent: str
    follows: tuple[str, ...]  # the first one that is stored
    needs: str = ""  # a stored name begins so, which shows that the model has this head
    models: str = ""  # the architecture's name begins so


# Absent even where the config does not tie the head: the encoder's and the decoder's embedding are one module.
_SHARED = (
    ("encoder.", "encoder.embed_tokens.weight", "shared.weight"),
    ("decoder.", "decoder.embed_tokens.weight", "shared.weight"),
    ("model.encoder.", "model.encoder.embed_tokens.weight", "model.shared.weight"),
    ("model.decoder.", "model.decoder.embed_tokens.weight", "model.shared.weight"),
)

# As the stored names end, whatever the model calls itself in front: bert., roberta., electra., ...
_WORDS = ("embeddings.word_embeddings.weight",)

_HEADS = (
    _Head("proj_out.weight", ("model.decoder.embed_tokens.weight",), models="Whisper"),
    _Head(
        "lm_head.weight",
        (
            "model.embed_tokens.weight",
            "model.language_model.embed_tokens.weight",
            "model.text_model.embed_tokens.weight",
            "shared.weight",
            "model.shared.weight",
            "model.decoder.embed_tokens.weight",
            "transformer.wte.weight",
            "transformer.word_embeddings.weight",
            "transformer.tokens_embed.weight",
            "backbone.embeddings.weight",
            "gpt_neox.embed_in.weight",
        ),
    ),
    # Vision-language models saved before transformers 4.52, and still their names on disk.
    _Head("language_model.lm_head.weight", ("language_model.model.embed_tokens.weight",)),
    _Head("cls.predictions.decoder.weight", _WORDS, needs="cls.predictions."),
    _Head("cls.predictions.decoder.bias", ("cls.predictions.bias",), needs="cls.predictions."),
    _Head("lm_head.decoder.weight", _WORDS, needs="lm_head."),
    _Head("lm_head.decoder.bias", ("lm_head.bias",), needs="lm_head.dense."),
    _Head("predictions.decoder.weight", _WORDS, needs="predictions."),
    _Head("predictions.decoder.bias", ("predictions.bias",), needs="predictions."),
    _Head("generator_lm_head.weight", _WORDS, needs="generator_predictions."),
    _Head("vocab_projector.weight", _WORDS, needs="vocab_"),
    _Head("pred_layer.proj.weight", ("transformer.embeddings.weight",), needs="pred_layer."),
    _Head("lm_loss.weight", ("transformer.word_embedding.weight",), needs="lm_loss."),
    _Head("decoder.weight", ("model.embeddings.tok_embeddings.weight",), models="ModernBert"),
    _Head("head.weight", ("rwkv.embeddings.weight",), models="Rwkv"),
)


def tied_weights(stored: Set[str], config: Mapping[str, object]) -> dict[str, str]:
    """Absent weight -> the stored one it follows, sorted."""
    in_order = sorted(stored)
    tied = {
        absent: source
        for family, absent, source in _SHARED
        if absent not in stored and source in stored and _any_begins(in_order, family)
    }
    if _ties_head(config):
        for head in _HEADS:
            if head.absent not in stored and _has(head, in_order, config) and (source := _source(head, stored)):
                tied[head.absent] = source
    return dict(sorted(tied.items()))


def _ties_head(config: Mapping[str, object]) -> bool:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        flag = part.get("tie_word_embeddings")
        if isinstance(flag, bool):
            return flag
    # Before transformers 5 the default was to tie, and defaults were not written. Without a config nothing is known.
    return bool(config)


def _any_begins(names_in_order: Sequence[str], prefix: str) -> bool:
    at = bisect_left(names_in_order, prefix)
    return at < len(names_in_order) and names_in_order[at].startswith(prefix)


def _has(head: _Head, names_in_order: Sequence[str], config: Mapping[str, object]) -> bool:
    architectures = config.get("architectures")
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    if head.needs:
        return _any_begins(names_in_order, head.needs)
    if head.models:
        return any(name.startswith(head.models) and _HAS_HEAD.search(name) for name in names)
    if not names:
        return config.get("tie_word_embeddings") is True
    model_prefixes = tuple(head_of_models.models for head_of_models in _HEADS if head_of_models.models)
    return any(_HAS_HEAD.search(name) and not name.startswith(model_prefixes) for name in names)


def _source(head: _Head, stored: Set[str]) -> str | None:
    for name in head.follows:
        if name in stored:
            return name
        if head.follows is _WORDS and (ends := [s for s in stored if s.endswith(f".{name}") and s.count(".") == 3]):
            return min(ends)
    return None
