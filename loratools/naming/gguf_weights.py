"""The names in transformers of the weights of a GGUF file, and where each lies in it.

What `naming/gguf.py` knows of modules, for a whole model: stacked experts have a name each, rows of heads are given in
the order of transformers, and what transformers keeps fused or cut is found through these names.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.naming.gguf import BY_MODEL_TYPE, Architecture, hf_module, hf_stack
from loratools.naming.heads import heads_field
from loratools.naming.language.experts import Expert, expert_name
from loratools.naming.places import Alias, GroupedHeads, HeadOrder, Part, Place
from loratools.naming.renaming import Shapes


def is_gguf(shapes: Shapes) -> bool:
    """Whether the weights of a base have the names of llama.cpp."""
    return "token_embd.weight" in shapes


def model_type_of(config: Mapping[str, object]) -> str | None:
    """The `model_type` of transformers for the architecture in a GGUF header; None if it is not known.

    Of several with the same names, such as llama and mistral, it is the first; of those with experts, it is mixtral.
    """
    return next((kind for kind, architecture in BY_MODEL_TYPE.items() if architecture.name == _name(config)), None)


def gguf_aliases(config: Mapping[str, object], shapes: Shapes) -> dict[str, Alias]:
    """Name in transformers -> where it lies, for every weight whose name there is known.

    A weight whose rows are heads in another order has no name where the header does not say how many heads there are,
    so that an adapter that needs it is refused.
    """
    by_name: dict[str, Alias] = {}
    for architecture in {a.name + str(a.wrapped): a for a in BY_MODEL_TYPE.values()}.values():
        if architecture.name == _name(config):
            for stored, shape in shapes.items():
                by_name |= _names(architecture, stored, shape, config)
    return by_name


def _name(config: Mapping[str, object]) -> str | None:
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    return name if isinstance(name, str) else None


def _names(
    architecture: Architecture, stored: str, shape: tuple[int, ...], config: Mapping[str, object]
) -> dict[str, Alias]:
    module, _, leaf = stored.rpartition(".")
    stack = hf_stack(architecture, module)
    if stack is not None and leaf == "weight" and len(shape) == 3:
        return {
            f"{expert_name(Expert(stack[0], i, stack[1]))}.weight": Alias(shape[1:], (Place(stored, at=Part(i)),))
            for i in range(shape[0])
        }
    name = hf_module(architecture, module)
    if name is None or leaf not in ("weight", "bias"):
        return {}
    order: HeadOrder | GroupedHeads | None = None
    if architecture.reorders(module):
        known = row_order(architecture, module, heads_of(config))
        if known is None or not known.fits(shape[0]):
            return {}
        order = known
    return {f"{name}.{leaf}": Alias(shape, (Place(stored, order=order),))}


def heads_of(config: Mapping[str, object]) -> tuple[int, int] | None:
    """How many heads queries and keys have, by a config of transformers; None if it does not say."""
    queries = config.get("num_attention_heads", config.get("n_head"))
    keys = config.get("num_key_value_heads")
    if config.get("model_type") == "falcon" and keys is None:
        new = config.get("new_decoder_architecture") is True
        keys = config.get("num_kv_heads", config.get("n_head_kv")) if new else 1 if _multi_query(config) else queries
    keys = queries if keys is None else keys
    if type(queries) is not int or type(keys) is not int or queries < 1 or keys < 1:
        return None
    return queries, keys


def _multi_query(config: Mapping[str, object]) -> bool:
    return config.get("multi_query", True) is True


def row_order(
    architecture: Architecture, module: str, heads: tuple[int, int] | None
) -> HeadOrder | GroupedHeads | None:
    """The order in which llama.cpp keeps the rows of a module that it reorders; None if the heads are not known.

    `module`: the GGUF name without `.weight`.
    """
    if heads is None:
        return None
    if architecture.grouped and module.endswith(".attn_qkv"):
        return GroupedHeads(*heads)
    return HeadOrder(heads[0] if heads_field(module) == "queries" else heads[1])
