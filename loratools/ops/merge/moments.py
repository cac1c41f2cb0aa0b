"""Second moments of the inputs of a model's layers, from a file, each with the weight that they belong to.

    model.layers.0.self_attn.q_proj   F32 (inputs, inputs): the sum, or the mean, of x x' over inputs x of the layer

The names are those of modules (a `.weight` at the end may be there), with or without the first parts that a checkpoint
has before them. `examples/moments.py` writes such a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from loratools.errors import MismatchError, UsageError
from loratools.storage.files import quoted
from loratools.storage.safetensors_reader import read_header
from loratools.tensors.dtypes import FLOAT_DTYPES
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.shapes import shape_text

_NOT_MOMENTS = ("count",)


def read_moments(path: str | Path) -> dict[str, LazyTensor]:
    """The moments in the file, by the names that they have there.

    Raises:
        UsageError: There is no such file.
        FormatError: It is no safetensors file.
        MismatchError: A tensor is no square matrix of floating-point numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no file {quoted(path)}", hint="examples/moments.py of the project writes one")
    tensors = {n: t for n, t in read_header(path).tensors.items() if n.rpartition(".")[2] not in _NOT_MOMENTS}
    wrong = [
        f"{name}   {tensor.dtype} {shape_text(tensor.shape)}"
        for name, tensor in tensors.items()
        if tensor.dtype not in FLOAT_DTYPES or len(tensor.shape) != 2 or tensor.shape[0] != tensor.shape[1]
    ]
    if wrong or not tensors:
        raise MismatchError(
            f"{quoted(path)} holds {len(wrong) or 'no'} tensors that are no second moments" if wrong
            else f"{quoted(path)} holds no second moments",
            details=wrong,
            hint="for each module a square matrix is needed: the sum of x x' over its inputs x",
        )  # fmt: skip
    return tensors


def by_weight(moments: Mapping[str, LazyTensor], weights: Iterable[str]) -> dict[str, LazyTensor]:
    """The moments by the name of the weight that each belongs to; what belongs to none, or to several, is left out."""
    ending: dict[str, list[str]] = {}
    for weight in weights:
        parts = weight.removesuffix(".weight").split(".")
        for i in range(len(parts)):
            ending.setdefault(".".join(parts[i:]), []).append(weight)
    matched: dict[str, LazyTensor] = {}
    for name, tensor in moments.items():
        parts = name.removesuffix(".weight").split(".")
        # Longest ending first: a checkpoint may have more in front, or the model in memory may.
        candidates = next((ending[e] for i in range(len(parts)) if (e := ".".join(parts[i:])) in ending), [])
        if len(candidates) == 1:
            matched[candidates[0]] = tensor
    return matched
