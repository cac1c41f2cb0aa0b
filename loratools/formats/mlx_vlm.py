"""mlx-vlm before it took over the layers of mlx-lm: `A` and `B` of each module, and the factor in the config.

adapters.safetensors    language_model.model.layers.0.self_attn.q_proj.A: (in, rank), .B: (rank, out)
adapter_config.json     rank, alpha, dropout: `y = W x + alpha * (x @ A) @ B`, whatever the rank
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.adapter import Adapter
from loratools.errors import FormatError
from loratools.formats.common.factor_pairs import paired
from loratools.formats.common.source import CONFIG, AdapterSource
from loratools.storage.files import quoted
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.views import transposed
from loratools.updates.lora import LoRA

_PARTS = ("A", "B")
# What its layers multiply with where nobody says.
_DEFAULT_ALPHA = 0.1


def detect(source: AdapterSource) -> bool:
    """By its two parts, which nothing else is beside, in matrices that make a product."""
    if source.container not in ("safetensors", "npz") or not source.tensors or _of_peft(source.config):
        return False
    modules: dict[str, dict[str, LazyTensor]] = {}
    for key, tensor in source.tensors.items():
        module, _, part = key.rpartition(".")
        if part not in _PARTS or not module or len(tensor.shape) != 2:
            return False
        modules.setdefault(module, {})[part] = tensor
    return all(set(parts) == set(_PARTS) and parts["A"].shape[1] == parts["B"].shape[0] for parts in modules.values())


def read(source: AdapterSource, *, rank_from: str | None = None) -> Adapter:
    """The adapter in `source`.

    Raises:
        FormatError: Factors that do not make a product, or an alpha that is no number.
    """
    parts: dict[str, dict[str, LazyTensor]] = {}
    for key, tensor in source.tensors.items():
        module, _, part = key.rpartition(".")
        parts.setdefault(module, {})[part] = transposed(tensor) if len(tensor.shape) == 2 else tensor
    config = source.config or {}
    factor = config.get("alpha")
    if factor is not None and (isinstance(factor, bool) or not isinstance(factor, int | float) or factor == 0):
        raise FormatError(f"{CONFIG}: alpha = {factor!r}: a number other than 0 is needed")
    scale, origin = (float(factor), "config") if factor is not None else (_DEFAULT_ALPHA, "assumed")
    updates = {
        module: LoRA(a, b, scale * a.shape[0], origin) for module, (a, b) in paired(source, parts, "A", "B").items()
    }
    warnings = []
    if factor is None:
        warnings.append(
            f"{quoted(source.file)} has no {CONFIG} with an alpha beside it; its factor is assumed to be "
            f"{_DEFAULT_ALPHA:g}, mlx-vlm's default"
        )
    return Adapter(
        updates,
        format="mlx-vlm",
        path=source.path,
        notes={"mlx-vlm": {"config": dict(config), "metadata": dict(source.metadata)}},
        warnings=tuple(warnings),
    )


def _of_peft(config: Mapping[str, object] | None) -> bool:
    return config is not None and "peft_type" in config
