"""The text of an index: which file has which tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping

_spelled = json.JSONEncoder().encode
_EMPTY = "{}\n}"


def index_text(metadata: Mapping[str, object], weight_map: Mapping[str, str]) -> str:
    """An index as `json.dumps` writes it with an indent of 2, which takes ten times as long for 100,000 names."""
    text = json.dumps({"metadata": metadata, "weight_map": {}}, indent=2)
    if not weight_map:
        return f"{text}\n"
    spelled_file = {file: _spelled(file) for file in set(weight_map.values())}
    lines = ",\n".join([f"    {_spelled(name)}: {spelled_file[file]}" for name, file in weight_map.items()])
    return f"{text.removesuffix(_EMPTY)}{{\n{lines}\n  }}\n}}\n"
