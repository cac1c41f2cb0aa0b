"""Factors by their names alone, whatever the format: A and B of each module, before any format has read them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from loratools.tensors.lazy import LazyTensor

# The part of the name that says which factor it is, with the names of adapters and `.weight` behind it. A bias of a
# factor (`lora_B.bias`) is none.
_FACTOR = re.compile(
    r"(?P<module>.*?)[._]?(?:lora_(?P<embedding>embedding_)?(?P<part>[AaBb]|down|up))(?P<adapter>\.(?!bias$)\w+)??(?P<end>\.weight)?"
)


def factor_pairs(tensors: Mapping[str, LazyTensor]) -> dict[str, dict[str, tuple[str, LazyTensor]]]:
    """For each module (with its adapter, and apart for embeddings) the factors `A` and `B`: their keys and tensors."""
    pairs: dict[str, dict[str, tuple[str, LazyTensor]]] = {}
    for key, tensor in tensors.items():
        if "lora_" not in key or (match := _FACTOR.fullmatch(key)) is None:
            continue
        module = match["module"] + (match["adapter"] or "") + (" (embedding)" if match["embedding"] else "")
        part = "A" if match["part"] in ("A", "a", "down") else "B"
        pairs.setdefault(module, {})[part] = key, tensor
    return pairs
