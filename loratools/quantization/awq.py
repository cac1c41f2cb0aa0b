"""AWQ: 4-bit integers packed along the outputs.

    GEMM   qweight I32 (in, out / 8)   qzeros I32 (in / group, out / 8)   scales (in / group, out)
    GEMV   qweight I32 (out, in / 8)   scales (out, groups, padded)

GPTQ has the same keys; it packs along the inputs, and has a g_idx.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.quantization.common.packed import packs_outputs, quantised_modules
from loratools.tensors.lazy import LazyTensor


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> tuple[str, ...]:
    """Names of the `qweight` that have no g_idx, and fewer columns than their scales (or, in GEMV, than rows)."""
    return tuple(f"{module}.qweight" for module in quantised_modules(tensors) if packs_outputs(module, tensors))
