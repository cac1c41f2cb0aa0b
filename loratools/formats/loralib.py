"""loralib: `MODULE.lora_A` and `MODULE.lora_B` without `.weight`, in a torch pickle, without alpha.

Microsoft's own package (https://github.com/microsoft/LoRA). A: (r, in), B: (out, r), as in PEFT. Alpha is an argument
of the layer and is stored nowhere. Tensors of other names are trained with them and replace weights: heads, biases.
"""

from __future__ import annotations

from loratools.adapter import Adapter, Replacement
from loratools.errors import UnsupportedError
from loratools.formats.common.factor_pairs import paired
from loratools.formats.common.source import AdapterSource, counted, shown
from loratools.storage.files import quoted
from loratools.tensors.lazy import LazyTensor
from loratools.updates.lora import LoRA

_PARTS = ("lora_A", "lora_B")


def detect(source: AdapterSource) -> bool:
    """By names that end in `.lora_A` and `.lora_B`, without PEFT's prefix."""
    if source.container not in ("pickle", "safetensors"):
        return False
    factor_names = [name for name in source.tensors if name.rpartition(".")[2] in _PARTS and "." in name]
    return bool(factor_names) and not any(name.startswith("base_model.") for name in factor_names)


def read(source: AdapterSource, *, rank_from: str | None = None) -> Adapter:
    """The adapter in `source`; alpha is assumed to be the rank.

    Raises:
        UnsupportedError: A merged linear layer, in which B is a grouped convolution.
        FormatError: Factors that do not make a product.
    """
    parts: dict[str, dict[str, LazyTensor]] = {}
    other_tensors: dict[str, LazyTensor] = {}
    for name, tensor in source.tensors.items():
        module, _, part = name.rpartition(".")
        if module and part in _PARTS:
            parts.setdefault(module, {})[part] = tensor
        else:
            other_tensors[name] = tensor
    _refuse_merged(source, parts)
    updates = {
        module: LoRA(a, b, float(a.shape[0]), "assumed")
        for module, (a, b) in paired(source, parts, "lora_A", "lora_B").items()
    }
    with_weight = {name.rpartition(".")[0] for name in other_tensors if name.endswith(".weight")}
    replacements = {
        name: Replacement(tensor, "modules_to_save" if name.rpartition(".")[0] in with_weight else "bias")
        for name, tensor in other_tensors.items()
    }
    return Adapter(updates, replacements, format="loralib", path=source.path)


def _refuse_merged(source: AdapterSource, parts: dict[str, dict[str, LazyTensor]]) -> None:
    merged = [
        module
        for module, factors in parts.items()
        if len(factors) == 2
        and all(len(t.shape) == 2 for t in factors.values())
        and factors["lora_A"].shape[0] != factors["lora_B"].shape[1]
        and factors["lora_A"].shape[0] % factors["lora_B"].shape[1] == 0
    ]
    if merged:
        raise UnsupportedError(
            f"{quoted(source.file)} has {counted(len(merged), 'merged linear layer')} of loralib, whose B is a grouped "
            "convolution over parts of the output that the file does not name",
            details=shown([quoted(module) for module in merged]),
            hint="build the layers with the enable_lora that was trained with, and save the product's factors",
        )
