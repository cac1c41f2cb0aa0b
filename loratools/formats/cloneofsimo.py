"""cloneofsimo/lora: `unet:0:up`, `text_encoder:3:down`, numbered as its trainer walked through Stable Diffusion.

https://github.com/cloneofsimo/lora, version 0.1. The header says for each part of the pipeline which classes were
trained; a number is the place of a linear layer among those inside of them, in the order in which diffusers 0.1x
registers them: down, up and middle blocks; attention to itself, GEGLU, attention to the text. Scale 1 unless it is
changed when it is used. Trained words (`<s1>`) are beside them, as rows for the text encoder's embedding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from loratools.adapter import Adapter, Replacement
from loratools.errors import FormatError, UnsupportedError
from loratools.formats.common.factor_pairs import paired
from loratools.formats.common.source import AdapterSource
from loratools.storage.files import quoted
from loratools.storage.json_file import parse_json
from loratools.tensors.lazy import LazyTensor
from loratools.updates.lora import LoRA

_FACTOR = re.compile(r"(?P<model>unet|text_encoder):(?P<number>\d{1,5}):(?P<part>up|down)")
_WORD = re.compile(r"<[^<>]+>")
# Attention blocks by their place, in the order of registration.
_BLOCKS = (
    *(f"down_blocks.{i}.attentions.{j}" for i in (0, 1, 2) for j in (0, 1)),
    *(f"up_blocks.{i}.attentions.{j}" for i in (1, 2, 3) for j in (0, 1, 2)),
    "mid_block.attentions.0",
)
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT = ("k_proj", "v_proj", "q_proj", "out_proj")


def detect(source: AdapterSource) -> bool:
    """By the names of its factors."""
    return source.container == "safetensors" and any(_FACTOR.fullmatch(name) for name in source.tensors)


def read(source: AdapterSource, *, rank_from: str | None = None) -> Adapter:
    """The adapter in `source`, under diffusers' names after `unet.` and `text_encoder.`.

    Raises:
        UnsupportedError: Layers that are not those of Stable Diffusion 1 or 2, or tensors of other names.
        FormatError: Factors that are missing or do not make a product.
    """
    parts: dict[str, dict[str, LazyTensor]] = {}
    tokens: dict[str, Replacement] = {}
    for name, tensor in source.tensors.items():
        if (parsed := _FACTOR.fullmatch(name)) is not None:
            parts.setdefault(f"{parsed['model']}:{int(parsed['number']):05d}", {})[parsed["part"]] = tensor
        elif _WORD.fullmatch(name):
            tokens[name] = Replacement(tensor, "trained word")
        else:
            raise UnsupportedError(f"{quoted(source.file)} has {quoted(name)}, which is no factor and no trained word")
    pairs = paired(source, parts, "down", "up")
    updates: dict[str, LoRA] = {}
    for model in ("unet", "text_encoder"):
        of_model = [pair for name, pair in pairs.items() if name.startswith(f"{model}:")]
        if not of_model:
            continue
        if [n for n in pairs if n.startswith(f"{model}:")][-1] != f"{model}:{len(of_model) - 1:05d}":
            raise FormatError(f"{quoted(source.file)} has gaps in the numbers of {model}")
        names = _unet(source, of_model) if model == "unet" else _text_encoder(source, of_model)
        for name, (a, b) in zip(names, of_model, strict=True):
            updates[f"{model}.{name}"] = LoRA(a, b, float(a.shape[0]), "assumed")
    return Adapter(
        updates, tokens, format="cloneofsimo", path=source.path, notes={"cloneofsimo": {"metadata": _texts(source)}}
    )


_Pairs = list[tuple[LazyTensor, LazyTensor]]


def _unet(source: AdapterSource, pairs: _Pairs) -> list[str]:
    trained = _trained(source, "unet")
    gated = "GEGLU" in trained if trained else len(pairs) % 9 == 0
    names = list(_unet_names(gated))
    if len(names) != len(pairs):
        raise _unknown(source, "unet", f"{len(pairs)} layers, where Stable Diffusion has {len(names)}")
    width = 0
    texts = set()
    for name, (a, b) in zip(names, pairs, strict=True):
        if name.endswith("attn1.to_q"):
            width = a.shape[1]
        from_text = name.endswith(("attn2.to_k", "attn2.to_v"))
        if from_text:
            texts.add(a.shape[1])
        out = 8 * width if name.endswith(".proj") else width
        if b.shape[0] != out or (not from_text and a.shape[1] != width):
            raise _unknown(source, "unet", f"a layer {a.shape[1]} -> {b.shape[0]} in the place of {name} ({width})")
    if len(texts) > 1:
        raise _unknown(source, "unet", f"texts of widths {sorted(texts)}")
    return names


def _unet_names(gated: bool) -> Iterator[str]:
    for block in _BLOCKS:
        inside = f"{block}.transformer_blocks.0"
        yield from (f"{inside}.attn1.{leaf}" for leaf in _ATTENTION)
        if gated:
            yield f"{inside}.ff.net.0.proj"
        yield from (f"{inside}.attn2.{leaf}" for leaf in _ATTENTION)


def _text_encoder(source: AdapterSource, pairs: _Pairs) -> list[str]:
    trained = _trained(source, "text_encoder")
    widths = {size for a, b in pairs for size in (a.shape[1], b.shape[0])}
    if trained - {"CLIPAttention"} or len(widths) != 1 or len(pairs) % len(_TEXT):
        raise _unknown(source, "text_encoder", f"{len(pairs)} layers of widths {sorted(widths)} in {sorted(trained)}")
    layers = range(len(pairs) // len(_TEXT))
    return [f"text_model.encoder.layers.{i}.self_attn.{leaf}" for i in layers for leaf in _TEXT]


def _trained(source: AdapterSource, model: str) -> set[str]:
    text = source.metadata.get(model)
    if text is None:
        return set()
    listed = parse_json(text.encode("utf-8"), f"{model} in the header of {quoted(source.file)}")
    return {str(entry) for entry in listed} if isinstance(listed, list) else set()


def _unknown(source: AdapterSource, model: str, evidence: str) -> UnsupportedError:
    return UnsupportedError(
        f"{quoted(source.file)} numbers the layers of another {model} than Stable Diffusion 1 or 2: {evidence}"
    )


def _texts(source: AdapterSource) -> dict[str, str]:
    """What the header says beside ranks and kinds, which the tensors say as well."""
    of_format = re.compile(r"(unet|text_encoder)(:\d+:rank)?|<[^<>]+>")
    return {key: text for key, text in source.metadata.items() if not of_format.fullmatch(key)}
