"""Weights that files have in one piece, and models in memory or adapters of a rewritten model in several.

Queries, keys and values; gate and up. Facts from the conversion mapping of transformers 5.23, held against models in
memory by test, and `fused`: models such as Phi-3 are trained as if they were Llama, with projections of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.naming.language.fused import parts_of
from loratools.naming.places import Alias, Part, Place
from loratools.naming.renaming import Shapes
from loratools.tensors.views import Span

_QKV = ("q_proj", "k_proj", "v_proj")
# By the `model_type` of a config: the module in files, and those in memory, which share its rows equally.
_SPLIT: dict[str, dict[str, tuple[str, ...]]] = {
    "dinov2": {"mlp.weights_in": ("mlp.gate_proj", "mlp.up_proj")},
    "dinov2_with_registers": {"mlp.weights_in": ("mlp.gate_proj", "mlp.up_proj")},
    "nomic_bert": {"attn.Wqkv": tuple(f"attn.{name}" for name in _QKV)},
    "jina_embeddings_v3": {"mixer.Wqkv": tuple(f"mixer.{name}" for name in _QKV)},
    "gte": {
        "attention.qkv_proj": tuple(f"attention.{name}" for name in _QKV),
        "mlp.up_gate_proj": ("mlp.up_proj", "mlp.gate_proj"),
    },
}


def split_aliases(config: Mapping[str, object], shapes: Shapes) -> dict[str, Alias]:
    """The pieces of such weights, and their biases, under the names that the whole one leads to."""
    aliases: dict[str, Alias] = {}
    rules = _SPLIT.get(str(config.get("model_type")), {})
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        if not shape:
            continue
        parts = parts_of(module)
        sizes = _sizes(config, shape[0], len(parts)) if parts else None
        for joint, names in rules.items():
            if module.endswith(f".{joint}") and shape[0] % len(names) == 0:
                parts = tuple(module.removesuffix(joint) + part for part in names)
                sizes = (shape[0] // len(names),) * len(names)
        start = 0
        for part, rows in zip(parts, sizes or (), strict=False):
            place = Place(name, at=Part(rows=Span(start, start + rows)))
            aliases[f"{part}.{leaf}"] = Alias((rows, *shape[1:]), (place,))
            start += rows
    return {name: alias for name, alias in aliases.items() if name not in shapes}


def _sizes(config: Mapping[str, object], rows: int, count: int) -> tuple[int, ...] | None:
    """How the rows are shared out: two halves; queries by the number of heads, keys and values what is left."""
    if count == 2:
        return (rows // 2, rows // 2) if rows % 2 == 0 else None
    heads, size, width = (config.get(key) for key in ("num_attention_heads", "head_dim", "hidden_size"))
    if not isinstance(heads, int) or heads < 1:
        return None
    if not isinstance(size, int):
        size = width // heads if isinstance(width, int) else 0
    rest = rows - heads * size
    return (heads * size, rest // 2, rest // 2) if size > 0 and rest > 0 and rest % 2 == 0 else None
