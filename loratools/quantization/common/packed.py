"""Code that GPTQ and AWQ share: the keys of a module, how to tell the two apart, and how scales are stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from loratools.quantization.common.parts import read_columns
from loratools.quantization.common.protocol import PackedWeight
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats


def quantised_modules(tensors: Mapping[str, LazyTensor]) -> Iterator[str]:
    """Recognise modules with `qweight`, `qzeros` and `scales`, where qweight holds integers."""
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part != "qweight" or tensor.dtype not in ("I32", "I16") or f"{module}.scales" not in tensors:
            continue
        if f"{module}.qzeros" in tensors or f"{module}.g_idx" in tensors:
            yield module


def packs_outputs(module: str, tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether the integers are packed along the outputs, as in AWQ; a g_idx excludes that."""
    if f"{module}.g_idx" in tensors:
        return False
    return tensors[f"{module}.qweight"].shape[-1:] != tensors[f"{module}.scales"].shape[-1:]


def scales_of_rows(weight: PackedWeight, start: int, stop: int) -> Floats:
    """The scales of rows start:stop, which are columns of the stored tensor: (rows, groups), in float32."""
    import numpy as np

    from loratools.algebra.rounding import widen

    scales = weight.tensor("scales")
    columns = read_columns(scales, start, stop)
    values = np.empty(columns.shape, np.float32)
    widen(columns, scales.dtype, values)
    by_row: Floats = values.T
    return by_row
