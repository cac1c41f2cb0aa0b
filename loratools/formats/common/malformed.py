"""Factors that cannot be factors in any format: without axes, without rows or columns, or of whole numbers.

Asked before a format reads its source, so that no reader has to guard every index of a shape.
"""

from __future__ import annotations

import re

from loratools.errors import FormatError
from loratools.formats.common.source import AdapterSource, counted, shown
from loratools.hints import DAMAGED_ADAPTER
from loratools.storage.files import quoted
from loratools.tensors.dtypes import is_floating
from loratools.tensors.lazy import LazyTensor

_FACTOR = re.compile(
    r"(?:^|[._])(?:lora_(?:[aAbB]|up|down|mid)|lora_embedding_[AB]|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))"
    r"(?:\.\w+)?(?:\.weight)?"
)
# Which of their axes is not the rank: it is never empty, though a rank of 0 may say that nothing changed.
_INPUTS = re.compile(r"lora_(?:A|down)(?:\.\w+)?(?:\.weight)?$")
_OUTPUTS = re.compile(r"lora_(?:B|up)(?:\.\w+)?(?:\.weight)?$")


def refuse_malformed(source: AdapterSource) -> None:
    """Check every tensor that is a factor by its name.

    Raises:
        FormatError: Some cannot be, each named with its shape or dtype.
    """
    faults = [
        f"{quoted(name)} {fault}"
        for name, tensor in source.tensors.items()
        # Names last: most tensors are sound by what costs nothing to see.
        if (not tensor.shape or 0 in tensor.shape or not is_floating(tensor.dtype))
        and _FACTOR.search(name) is not None
        and (fault := _fault(name, tensor)) is not None
    ]
    if faults:
        raise FormatError(
            f"{quoted(source.file)} has {counted(len(faults), 'fault')} in its factors",
            details=shown(sorted(faults)),
            hint=DAMAGED_ADAPTER,
            defect="shapes-factor",
        )


def _fault(name: str, tensor: LazyTensor) -> str | None:
    shape = tensor.shape
    if not shape:
        return "has shape []; a matrix is needed"
    if not is_floating(tensor.dtype):
        return f"has dtype {tensor.dtype}; a floating-point tensor is needed"
    if _INPUTS.search(name) is not None and 0 in shape[1:]:
        return f"has shape {list(shape)}, without columns"
    if _OUTPUTS.search(name) is not None and shape[0] == 0:
        return f"has shape {list(shape)}, without rows"
    return None
