"""SAMed and Sam_LoRA: `w_a_000` and `w_b_000`, queries and values of each block of SAM's image encoder in turn.

https://github.com/hitachinsk/SAMed, https://github.com/JamesQFreeman/Sam_LoRA. Block i has A and B of its queries at
2 i and of its values at 2 i + 1, added to the first and last third of `attn.qkv` with scale 1. Which blocks have any
is an argument of the trainer that is stored nowhere; all of them is its default. Other tensors are trained parts of
the model.
"""

from __future__ import annotations

import re

from loratools.adapter import Adapter, Replacement
from loratools.errors import FormatError
from loratools.formats.common.factor_pairs import paired
from loratools.formats.common.source import AdapterSource
from loratools.storage.files import quoted
from loratools.tensors.joined import block_matrix
from loratools.tensors.lazy import LazyTensor
from loratools.updates.lora import LoRA

_FACTOR = re.compile(r"w_(?P<part>[ab])_(?P<number>\d{3})(\.weight)?")
_QUERIES, _VALUES, _PARTS = 0, 2, 3


def detect(source: AdapterSource) -> bool:
    """By the names of its factors."""
    return source.container in ("pickle", "safetensors") and any(_FACTOR.fullmatch(name) for name in source.tensors)


def read(source: AdapterSource, *, rank_from: str | None = None) -> Adapter:
    """The adapter in `source`; alpha is assumed to be the rank, which is what its trainers compute with.

    Raises:
        FormatError: factors that are missing, or do not make products of one block.
    """
    parts: dict[str, dict[str, LazyTensor]] = {}
    replacements: dict[str, Replacement] = {}
    for name, tensor in source.tensors.items():
        parsed = _FACTOR.fullmatch(name)
        if parsed is None:
            replacements[name] = Replacement(tensor, "modules_to_save")
        else:
            parts.setdefault(parsed["number"], {})[f"w_{parsed['part']}"] = tensor
    pairs = paired(source, parts, "w_a", "w_b")
    if len(pairs) % 2 or list(pairs) != [f"{n:03d}" for n in range(len(pairs))]:
        raise FormatError(
            f"{quoted(source.file)} has {len(pairs)} pairs of factors up to {max(pairs)}; two for each block, "
            "one for queries and one for values, are needed"
        )
    updates = {}
    numbered = list(pairs.values())
    for block in range(len(numbered) // 2):
        updates[f"image_encoder.blocks.{block}.attn.qkv"] = _joined(source, block, *numbered[2 * block : 2 * block + 2])
    return Adapter(
        updates,
        replacements,
        format="sam-lora",
        path=source.path,
        warnings=(
            f"the file does not say which blocks it is for; they are taken to be the first {len(updates)}, all of them",
        ),
    )


def _joined(
    source: AdapterSource, block: int, queries: tuple[LazyTensor, LazyTensor], values: tuple[LazyTensor, LazyTensor]
) -> LoRA:
    (qa, qb), (va, vb) = queries, values
    if qa.shape[1] != va.shape[1] or qb.shape[0] != vb.shape[0] or {t.dtype for t in (qa, qb, va, vb)} != {qa.dtype}:
        raise FormatError(f"{quoted(source.file)} has queries and values of block {block} that do not fit each other")
    width, rank = qb.shape[0], qa.shape[0] + va.shape[0]
    a = block_matrix((rank, qa.shape[1]), [(0, 0, qa), (qa.shape[0], 0, va)])
    b = block_matrix((_PARTS * width, rank), [(_QUERIES * width, 0, qb), (_VALUES * width, qa.shape[0], vb)])
    return LoRA(a, b, float(rank), "assumed")
