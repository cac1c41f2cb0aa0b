"""Vision transformers whose layers transformers 5 names otherwise in memory than in files.

Adapters carry the names in memory: `layers.0.attention.q_proj` since transformers 5, and before that the name that the
files still have, `encoder.layer.0.attention.attention.query`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_LAYER = re.compile(r"(^|\.)encoder\.layer\.(\d+)\.")
_PARTS = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
# Model types, and whether the layers are no longer in an `encoder`.
_TYPES = {
    "audio-spectrogram-transformer": True,
    "beit": True,
    "deit": True,
    "dinov2": False,
    "dinov2_with_registers": False,
    "ijepa": True,
    "vit": True,
    "vit_msn": True,
    "vivit": True,
}


def in_memory(model_type: str | None, stored: Iterable[str]) -> dict[str, str]:
    """Name in memory -> stored name, of the weights where the two differ."""
    moved = _TYPES.get(model_type or "")
    if moved is None:
        return {}
    names: dict[str, str] = {}
    for name in stored:
        layer = _LAYER.search(name)
        if layer is None:
            continue
        head = f"{name[: layer.start()]}{layer[1]}layers.{layer[2]}." if moved else name[: layer.end()]
        part, dot, leaf = name[layer.end() :].rpartition(".")
        new = f"{head}{_PARTS.get(part, part)}{dot}{leaf}"
        if new != name:
            names[new] = name
    return names
