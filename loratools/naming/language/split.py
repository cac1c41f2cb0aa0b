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

_LINEAR_ATTENTION = "linear_attn.in_proj_qkv"
# Vision transformers have as many heads of keys as of queries.
_OF_VISION = ".attn.qkv"
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
        sizes = _sizes_of(module, config, shape[0], shapes) if parts else None
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


def aliases_by_rows(rows_of: Mapping[str, int], shapes: Shapes) -> dict[str, Alias]:
    """The pieces of fused weights whose rows an adapter tells, where their sum is that of the weight.

    Args:
        rows_of: The rows of each part that an adapter has, by the end of its name, such as `linear_attn.in_proj_q`.
        shapes: The weights of a base by name.
    """
    aliases: dict[str, Alias] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        parts = parts_of(module) if shape and module != name else ()
        sizes = [rows_of.get(".".join(part.split(".")[-2:])) for part in parts]
        if not parts or sum(size or 0 for size in sizes) != shape[0] or None in sizes:
            continue
        start = 0
        for part, rows in zip(parts, sizes, strict=True):
            assert rows is not None, "none is unknown"
            place = Place(name, at=Part(rows=Span(start, start + rows)))
            aliases[f"{part}.weight"] = Alias((rows, *shape[1:]), (place,))
            start += rows
    return {name: alias for name, alias in aliases.items() if name not in shapes}


def _sizes_of(module: str, config: Mapping[str, object], rows: int, shapes: Shapes) -> tuple[int, ...] | None:
    if module.endswith(_OF_VISION):
        return (rows // 3,) * 3 if rows % 3 == 0 else None
    if not module.endswith(_LINEAR_ATTENTION):
        return _sizes(config, rows, len(parts_of(module)))
    # Values have as many rows as their gate beside them; queries and keys share the others.
    gate = shapes.get(f"{module.removesuffix('qkv')}z.weight")
    remaining = rows - gate[0] if gate else 0
    return (remaining // 2, remaining // 2, rows - remaining) if remaining > 0 and remaining % 2 == 0 else None


def _sizes(config: Mapping[str, object], rows: int, count: int) -> tuple[int, ...] | None:
    """How the rows are shared out: two halves; queries by the number of heads, keys and values what is left."""
    if count == 2:
        return (rows // 2, rows // 2) if rows % 2 == 0 else None
    heads, size, width = (config.get(key) for key in ("num_attention_heads", "head_dim", "hidden_size"))
    if not isinstance(heads, int) or heads < 1:
        return None
    if not isinstance(size, int):
        size = width // heads if isinstance(width, int) else 0
    remaining = rows - heads * size
    return (heads * size, remaining // 2, remaining // 2) if size > 0 and remaining > 0 and remaining % 2 == 0 else None
