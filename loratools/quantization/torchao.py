"""torchao: a tensor subclass stored as its parts.

    _weight_qdata I8 | U8 | I32 | F8 (out, ...)   _weight_scale | _weight_scale_and_zero   _weight_zero_point

Older files are pickles of the subclass itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.tensors.lazy import LazyTensor


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> tuple[str, ...]:
    """Names of the `_qdata` that have a scale beside them."""
    return tuple(
        name
        for name in tensors
        if name.endswith("_qdata")
        and any(name.removesuffix("qdata") + part in tensors for part in ("scale", "scale_and_zero"))
    )
