"""GPTQ: integers packed along the inputs.

    qweight I32 (in * bits / 32, out)   qzeros I32 (groups, out * bits / 32)   scales (groups, out)   g_idx I32 (in)

AWQ has the same keys; it packs along the outputs, and has no g_idx.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.quantization.common.packed import packs_outputs, quantised_modules
from loratools.tensors.lazy import LazyTensor


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> tuple[str, ...]:
    """Names of the `qweight` that have a g_idx, or as many columns as their scales."""
    return tuple(f"{module}.qweight" for module in quantised_modules(tensors) if not packs_outputs(module, tensors))
