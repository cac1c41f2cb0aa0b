"""optimum-quanto: the parts of its tensor subclass, behind the weight's name.

    8 bit     weight._data I8 | F8 (out, in)   weight._scale (out, 1)
    2, 4 bit  weight._data._data U8            weight._scale, weight._shift

The plain name `weight` is in no file.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.tensors.lazy import LazyTensor


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> tuple[str, ...]:
    """Names of the `_data` whose weight has a `_scale`."""
    return tuple(
        name for name in tensors if name.endswith("._data") and f"{name.partition('._data')[0]}._scale" in tensors
    )
