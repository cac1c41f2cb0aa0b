"""bitsandbytes: NF4 and FP4 in blocks, and LLM.int8().

    4 bit   weight U8 (n / 2, 1), weight.absmax, weight.quant_map, weight.quant_state.bitsandbytes__nf4 | __fp4
    8 bit   weight I8 (out, in), SCB (out)

The names are those that transformers saves.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.tensors.lazy import LazyTensor

_STATE = ".quant_state.bitsandbytes__"


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> tuple[str, ...]:
    """Names of weights with a quantisation state, and of int8 weights with their row constants."""
    with_state = {name.partition(_STATE)[0] for name in tensors if _STATE in name}
    return tuple(name for name, tensor in tensors.items() if _is_quantised(name, tensor, tensors, with_state))


def _is_quantised(name: str, tensor: LazyTensor, tensors: Mapping[str, LazyTensor], with_state: set[str]) -> bool:
    if tensor.dtype == "I8":
        return name.endswith("weight") and name.removesuffix("weight") + "SCB" in tensors
    # bitsandbytes can store the packed bytes as another dtype of the same bits (bnb_4bit_quant_storage).
    return name in with_state or (tensor.dtype == "U8" and {f"{name}.absmax", f"{name}.quant_map"} <= tensors.keys())
