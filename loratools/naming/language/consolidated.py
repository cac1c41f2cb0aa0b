"""The authors' own names of Llama and Mistral, and in which order they keep the rows of queries and keys.

Facts from Meta's llama-models and mistral-inference, and from the conversion scripts of transformers, which undo the
order: a rotary embedding turns neighbouring rows of a head there, and the two halves of a head in transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from loratools.naming.places import Alias, HeadOrder, Place
from loratools.naming.renaming import Shapes

_OUTSIDE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_INSIDE = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.gate": "block_sparse_moe.gate",
}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"feed_forward\.experts\.(\d+)\.(w[123])")


def is_consolidated(shapes: Shapes) -> bool:
    """Whether the weights of a base have these names."""
    return "tok_embeddings.weight" in shapes and "layers.0.attention.wq.weight" in shapes


def consolidated_aliases(params: Mapping[str, object], shapes: Shapes) -> dict[str, Alias]:
    """Name in transformers -> where it lies. `params`: what params.json says, of heads above all."""
    aliases: dict[str, Alias] = {}
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        renamed = _renamed(module)
        heads = _heads(module, params)
        # Without a number of heads that fits, the name stays unknown, and an adapter that needs it is refused.
        if renamed is None or (heads is not None and (heads < 1 or shape[0] % (2 * heads))):
            continue
        aliases[f"{renamed}.{leaf}"] = Alias(
            shape, (Place(name, order=HeadOrder(heads) if heads is not None else None),)
        )
    return aliases


def _renamed(module: str) -> str | None:
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    layer = _LAYER.fullmatch(module)
    if layer is None:
        return None
    if (expert := _EXPERT.fullmatch(layer[2])) is not None:
        return f"model.layers.{layer[1]}.block_sparse_moe.experts.{expert[1]}.{expert[2]}"
    return f"model.layers.{layer[1]}.{_INSIDE[layer[2]]}" if layer[2] in _INSIDE else None


def _heads(module: str, params: Mapping[str, object]) -> int | None:
    """How many heads the rows of a module stand in the order of; None if they stand in that of transformers."""
    leaf = module.rpartition(".")[2]
    if leaf not in ("wq", "wk"):
        return None
    queries, keys = params.get("n_heads"), params.get("n_kv_heads")
    heads = keys if leaf == "wk" and isinstance(keys, int) else queries
    return heads if isinstance(heads, int) else 0
