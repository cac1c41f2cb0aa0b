"""How layers of fused experts keep their weights in memory: (experts, out, in), or (experts, in, out)."""

from __future__ import annotations

# Those whose layers say `is_transposed` in transformers 5, by `model_type`; the others compute with (out, in).
_IN_OUT = frozenset({"aria", "gpt_oss", "openai_privacy_filter"})


def stored_in_out(model_type: str | None) -> bool:
    """Whether the layers of experts of such a model say that they keep (experts, in, out)."""
    return model_type in _IN_OUT
