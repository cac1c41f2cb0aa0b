"""torchtune: its own names, `layers.0.attn.q_proj.lora_a.weight`, in adapter_model.pt or adapter_0.pt.

Facts from torchtune's convert_weights.py. A: (r, in), B: (out, r), `magnitude` of DoRA as in PEFT. The Llama, Mistral
and Gemma models of torchtune rotate neighbouring rows of a query or key head where Hugging Face rotates its halves, so
that these rows are in another order; Qwen and Phi-3 are not. What torchtune exports under PEFT's names is PEFT's.
"""

from __future__ import annotations

import re
from dataclasses import replace

from loratools.adapter import Adapter
from loratools.errors import FormatError, MismatchError, UnsupportedError
from loratools.formats.common.base import Base
from loratools.formats.common.factor_pairs import paired
from loratools.formats.common.source import CONFIG, AdapterSource, counted, shown
from loratools.formats.peft_parts import config as fields
from loratools.naming.heads import heads_field, interleaving, inverse
from loratools.storage.files import quoted
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.views import reordered
from loratools.updates.lora import LoRA

_FACTOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_a\.weight|lora_b\.weight|magnitude)")
_MODULES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
# By the `model_type` of the base: whether torchtune has the rows of its queries and keys in another order.
_INTERLEAVED = {
    "llama": True, "mistral": True, "gemma": True, "gemma2": True, "qwen2": False, "qwen3": False, "phi3": False,
}  # fmt: skip


def detect(source: AdapterSource) -> bool:
    """By factors named `.lora_a.weight` and `.lora_b.weight`."""
    return source.container in ("pickle", "safetensors") and any(
        name.endswith((".lora_a.weight", ".lora_b.weight")) for name in source.tensors
    )


def read(source: AdapterSource, *, rank_from: str | None = None) -> Adapter:
    """The adapter in `source`, under its Hugging Face names; it is uncertain where the order of rows is not known.

    Raises:
        UnsupportedError: Tensors or modules of other names; an architecture of the base that is not known.
        FormatError: Factors that do not make a product.
    """
    parts: dict[str, dict[str, LazyTensor]] = {}
    foreign: list[str] = []
    for name, tensor in source.tensors.items():
        parsed = _FACTOR.fullmatch(name)
        module = _hugging_face(parsed["module"]) if parsed is not None else None
        if parsed is None or module is None:
            foreign.append(name)
        else:
            parts.setdefault(module, {})[parsed["part"]] = tensor
    if foreign:
        raise UnsupportedError(
            f"{quoted(source.file)} has {counted(len(foreign), 'tensor')} that are no factors of torchtune",
            details=shown([quoted(name) for name in foreign]),
        )
    numbers = fields.scaling(source.config or {})
    heads = _heads(source.base)
    updates: dict[str, LoRA] = {}
    unordered: list[str] = []
    for module, (a, b) in paired(source, parts, "lora_a.weight", "lora_b.weight").items():
        alpha, alpha_source = (numbers.alpha, "config") if numbers.alpha is not None else (float(a.shape[0]), "assumed")
        update = LoRA(a, b, alpha, alpha_source, magnitude=_magnitude(source, module, parts[module], b.shape[0]))
        heads_name = heads_field(module)
        if heads_name is not None and heads is None:
            unordered.append(module)
        elif heads_name is not None and heads is not None and heads_name in heads:
            update = _in_halves(module, update, heads[heads_name])
        updates[module] = update
    uncertainties = []
    if unordered:
        uncertainties.append(
            f"{counted(len(unordered), 'module')}, such as {quoted(unordered[0])}, may have their rows in torchtune's "
            "order; whether, and how many heads they are, is said in the config of the base alone"
        )
    base_model = (source.config or {}).get("base_model_name_or_path")
    return Adapter(
        updates,
        format="torchtune",
        path=source.path,
        base_model=base_model if isinstance(base_model, str) and base_model else None,
        notes={"torchtune": {"config": dict(source.config or {}), "metadata": dict(source.metadata)}},
        uncertainties=tuple(uncertainties),
        warnings=() if source.config is not None else (f"{quoted(source.file)} has no {CONFIG} beside it",),
        remedy="convert it first: loratools convert ADAPTER -o OUT --to peft --base BASE",
    )


def _hugging_face(module: str) -> str | None:
    if module == "output":
        return "lm_head"
    parsed = _LAYER.fullmatch(module)
    inside = _MODULES.get(parsed[2]) if parsed is not None else None
    return f"model.layers.{parsed[1]}.{inside}" if parsed is not None and inside is not None else None


def _heads(base: Base | None) -> dict[str, int] | None:
    """Counts of heads by which rows are interleaved, empty if they are not; None if nobody says."""
    if base is None or not base.config:
        return None
    interleaved = _INTERLEAVED.get(base.model_type or "")
    if interleaved is None:
        raise UnsupportedError(
            f"{quoted(base.name)} is of model_type {base.model_type!r}, whose rows in torchtune are not known here",
            hint=f"known are {', '.join(sorted(_INTERLEAVED))}",
        )
    queries = base.whole_number("num_attention_heads")
    if not interleaved or queries is None:
        return {} if not interleaved else None
    return {"queries": queries, "keys": base.whole_number("num_key_value_heads") or queries}


def _magnitude(source: AdapterSource, module: str, parts: dict[str, LazyTensor], out: int) -> LazyTensor | None:
    magnitude = parts.get("magnitude")
    if magnitude is not None and magnitude.shape != (out,):
        raise FormatError(
            f"{quoted(source.file)} has a magnitude of shape {list(magnitude.shape)} for {quoted(module)}"
        )
    return magnitude


def _in_halves(module: str, update: LoRA, heads: int) -> LoRA:
    try:
        order = inverse(interleaving(update.b.shape[0], heads))
    except ValueError as error:
        raise MismatchError(f"{quoted(module)} does not fit the base: {error}") from error
    # A magnitude is a number for each row, and goes with it.
    magnitude = reordered(update.magnitude, order) if update.magnitude is not None else None
    return replace(update, b=reordered(update.b, order), magnitude=magnitude)
