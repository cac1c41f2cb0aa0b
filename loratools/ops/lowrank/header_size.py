"""How large the header of a file of factors can be, for budgets in bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence

# What a tensor adds to a safetensors header besides the name of its module: the longest prefix and suffix (PEFT's
# `base_model.model.` and `.base_layer.lora_A.weight`), its dtype, shape and offsets, and a share of the rest.
_TENSOR_BYTES = 160


def header_bytes(modules: Sequence[str], replaced: Sequence[str] = ()) -> int:
    """An upper bound of the header of a file with A and B of each module, and one tensor for each replaced weight."""
    # Whether the name is written as UTF-8 or escaped, it is no longer than this.
    of_modules, of_replaced = (sum(len(json.dumps(n)) + _TENSOR_BYTES for n in names) for names in (modules, replaced))
    return 2 * of_modules + of_replaced
