"""What the tensors of a checkpoint are, by their names and shapes, and what an extraction makes of each.

linear      2 axes, `weight`                              low-rank factors
conv        3 to 5 axes, `weight`                         low-rank factors; replaced where it has one input channel,
                                                          since that may be a grouped convolution, which has none
experts     3 axes, a parameter of a module `experts`     low-rank factors for each expert
embedding   2 axes, `weight` of a module called so        low-rank factors, or replaced, whichever is smaller
vector      1 axis, in a module of vectors (a norm)       replaced, the whole module
bias        1 axis, beside a weight                       replaced
other       anything else                                 left out: an adapter has no way to load it
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypedDict

from loratools.tensors.lazy import LazyTensor

Layer = Literal["linear", "conv", "embedding", "experts"]
Kind = Literal["linear", "conv", "embedding", "experts", "vector", "bias", "other"]

# Modules that look up rows by number: their 2-D weight is a table, not a linear map. The last part of their names, as
# transformers has them; `embedding_hidden_mapping_in` and the like are linear layers, so it must be all of the part.
_EMBEDDING = re.compile(
    r"(.*_)?(embed|embeds|embedding|embeddings|emb)|(tokens|positions)_embed|(embed|emb)_(tokens|positions|in)"
    r"|embed_tokens_(per_layer|extend)|wte|wpe|shared|relative_attention_bias|pos_emb(edding)?s?"
)


class Treatment(TypedDict, total=False):
    """The fields of a pair that say what becomes of it."""

    layer: Layer
    declared: str
    why: str


@dataclass(frozen=True)
class Kinds:
    """The kinds of layers that the tensors of a checkpoint belong to.

    `tensors`: all of a checkpoint, since what a tensor is may depend on those beside it.
    """

    tensors: Mapping[str, LazyTensor]

    def treatment(self, name: str, tensor: LazyTensor) -> Treatment:
        kind = kind_of(name, tensor)
        if kind == "vector":
            module_weight = self.tensors.get(name.rpartition(".")[0] + ".weight")
            if module_weight is not None and len(module_weight.shape) == 1:
                return {"declared": "modules_to_save"}
            return {"why": "a parameter that is no module of its own"}
        if kind == "bias":
            module_weight = self.tensors.get(name.rpartition(".")[0] + ".weight")
            if module_weight is None:
                return {"why": "a parameter that is no module of its own"}
            return {"declared": "modules_to_save" if len(module_weight.shape) == 1 else "bias"}
        if kind == "conv" and tensor.shape[1] == 1:
            return {"declared": "modules_to_save"}
        if kind == "other":
            return {"why": f"not the weight of a layer that is known here: {_axes(tensor)}"}
        return {"layer": kind}


def is_embedding(name: str) -> bool:
    """Whether the tensor `name` is a table of vectors."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and _EMBEDDING.fullmatch(module.rpartition(".")[2]) is not None


def kind_of(name: str, tensor: LazyTensor) -> Kind:
    """What a tensor is."""
    module, _, leaf = name.rpartition(".")
    axes = len(tensor.shape)
    if is_embedding(name):
        return "embedding" if axes == 2 else "other"
    if axes == 1:
        return "bias" if leaf == "bias" else "vector"
    if leaf == "weight" and axes == 2:
        return "linear"
    if leaf == "weight" and 3 <= axes <= 5:
        return "conv"
    if axes == 3 and module.rpartition(".")[2] == "experts":
        return "experts"
    return "other"


def _axes(tensor: LazyTensor) -> str:
    return f"{len(tensor.shape)} axes" if len(tensor.shape) != 1 else "a vector"
