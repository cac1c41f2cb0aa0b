"""Weights that files have in one piece and transformers 5 in several: queries, keys and values, gate and up.

Facts from the conversion mapping of transformers 5.23, held against models in memory by test.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.naming.places import Alias, Part, Place
from loratools.naming.renaming import Shapes
from loratools.tensors import Span

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
    found: dict[str, Alias] = {}
    rules = _SPLIT.get(str(config.get("model_type")), {})
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        for joint, parts in rules.items():
            if not module.endswith(f".{joint}") or not shape or shape[0] % len(parts):
                continue
            rows = shape[0] // len(parts)
            for i, part in enumerate(parts):
                at = Part(rows=Span(i * rows, (i + 1) * rows))
                place = Place(name, at=at)
                found[f"{module.removesuffix(joint)}{part}.{leaf}"] = Alias((rows, *shape[1:]), (place,))
    return found
