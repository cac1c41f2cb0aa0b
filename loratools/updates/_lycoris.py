"""Which kind a module of LyCORIS is, by the parts that it stores: `LYCORIS_PARTS` and `from_lycoris` of that kind."""

from __future__ import annotations

from collections.abc import Collection

# In the order in which LyCORIS tells them apart.
_BY_PART = {
    "lora_up.weight": "lora",
    "hada_w1_a": "loha",
    "on_input": "ia3",
    "lokr_w1": "lokr",
    "lokr_w1_a": "lokr",
    "diff": "full",
    "w_norm": "full",
    "oft_blocks": "lycoris-oft",
    "a1.weight": "lycoris-glora",
}


def kind_of(parts: Collection[str]) -> str | None:
    """The file in `updates/` that knows these parts, without alpha; None where none does."""
    return next((kind for part, kind in _BY_PART.items() if part in parts), None)
