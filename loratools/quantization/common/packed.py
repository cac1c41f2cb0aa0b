"""What GPTQ and AWQ share: the keys of a module, and the axis that they are told apart by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from loratools.tensors.lazy import LazyTensor


def quantised_modules(tensors: Mapping[str, LazyTensor]) -> Iterator[str]:
    """Modules with `qweight`, `qzeros` and `scales`, where qweight holds integers."""
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part != "qweight" or tensor.dtype not in ("I32", "I16") or f"{module}.scales" not in tensors:
            continue
        if f"{module}.qzeros" in tensors or f"{module}.g_idx" in tensors:
            yield module


def packs_outputs(module: str, tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether the integers are packed along the outputs, as AWQ does; a g_idx settles that they are not."""
    if f"{module}.g_idx" in tensors:
        return False
    return tensors[f"{module}.qweight"].shape[-1:] != tensors[f"{module}.scales"].shape[-1:]
