"""From the parts that a file has for a module to updates, and back.

LoRA and whole differences are made here. Any other kind makes its own, by `from_lycoris` in its file in `updates/`; one
that has none, or no file, is recognised by its spelling and refused by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from loratools.errors import FormatError, UnsupportedError
from loratools.formats.image_parts.spellings import KINDS, Module
from loratools.storage.files import quoted
from loratools.tensors.dtypes import is_floating
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.views import reshaped
from loratools.updates.full import Full
from loratools.updates.lora import LoRA
from loratools.updates.parts.kind_files import LycorisKind, lycoris_kind
from loratools.updates.parts.protocol import Update

_NAMES = {
    "loha": "LoHa", "lokr": "LoKr", "lycoris-glora": "GLoRA", "lycoris-oft": "OFT or BOFT", "ia3": "IA3",
    "tlora": "T-LoRA",
    "padding": "a weight of the base made larger (reshape_weight)",
}  # fmt: skip


# Spellings that have no file of their name in `updates/`.
_FILES = {"onetrainer-oft": "oft"}
# Kinds other than LoRA and whole differences that are written as LyCORIS does.
WRITTEN = ("ia3", "loha", "lokr", "lycoris-glora", "lycoris-oft")


@dataclass(frozen=True)
class Scale:
    """Alpha and where it is from; None for the rank, which is what all readers of these files assume."""

    alpha: float | None
    source: str
    rslora: bool = False


class NotReadError(Exception):
    """Why the parts of a module make no update. `unsupported`: sound, but of a kind that is not read."""

    def __init__(self, why: str, *, unsupported: bool = False) -> None:
        super().__init__(why)
        self.unsupported = unsupported


def updates_of(module: Module, scale: Scale) -> dict[str, Update]:
    """What a module's parts mean, by what is to be added to its name: nothing, or `.bias`."""
    kinds = module.kinds - {"full"}
    if not module.kinds:
        first = next(iter(module.keys.values()))
        raise NotReadError(f"{quoted(first)} has no partner")
    if unread := sorted(kind for kind in kinds if kind not in _READERS and _file_of(kind) is None):
        raise NotReadError(_NAMES.get(unread[0], unread[0]), unsupported=True)
    if len(kinds) > 1 or ("diff" in module.parts and kinds):
        raise NotReadError(f"parts of several kinds: {', '.join(quoted(key) for key in sorted(module.keys.values()))}")
    if scale.alpha is not None and not math.isfinite(scale.alpha):
        raise NotReadError(f"{quoted(module.name)} has an alpha of {scale.alpha}")
    updates: dict[str, Update] = {}
    if bias := module.parts.get("diff_b") or module.parts.get("bias"):
        updates[".bias"] = Full(bias)
    if kinds or "diff" in module.parts:
        kind = next(iter(kinds), "full")
        updates |= {"": _READERS[kind](module, scale)} if kind in _READERS else _lycoris_updates(kind, module, scale)
    _refuse_other_bias(module, updates)
    return updates


def _refuse_other_bias(module: Module, updates: Mapping[str, Update]) -> None:
    """Raise NotReadError where a difference of the bias has other outputs than the update of the weight."""
    if "" not in updates or ".bias" not in updates:
        return
    shape, bias = updates[""].shape, updates[".bias"].shape
    # A difference without axes is refused for that, by whoever holds it to its weight.
    if shape and shape[0] is not None and bias != (shape[0],):
        message = f"{quoted(module.name)} has {shape[0]} outputs, and a difference of its bias of {list(bias)}"
        raise NotReadError(message)


def lycoris_parts(update: Update) -> dict[str, LazyTensor] | None:
    """Its tensors by the suffixes of LyCORIS, and alpha not among them; None if it has no such spelling."""
    spelled = {part: suffix for kind in ("any", update.kind) for suffix, part in KINDS.get(kind, {}).items()}
    # `.weight` of IA3 is no sign of a kind, so that KINDS has no entry for it.
    spelled |= {"magnitude": ".dora_scale", "weight": ".weight"}
    parts = update.lycoris_parts() if update.kind in WRITTEN else None
    if parts is None or any(part not in spelled for part in parts):
        return None
    return {spelled[part]: tensor for part, tensor in parts.items()}


def _file_of(kind: str) -> LycorisKind | None:
    """The file that makes updates from what LyCORIS and compatible programs store for a kind; None if there is none."""
    return lycoris_kind(_FILES.get(kind, kind))


def _lycoris_updates(kind: str, module: Module, scale: Scale) -> Mapping[str, Update]:
    file = _file_of(kind)
    assert file is not None
    parts = {key[len(module.name) + 1 :]: module.parts[part] for part, key in module.keys.items() if part != "alpha"}
    if "magnitude" in module.parts:
        parts = {k: t for k, t in parts.items() if t is not module.parts["magnitude"]}
        magnitude = module.parts["magnitude"]
        # Of one axis: a number for each output, as ComfyUI takes it.
        parts["dora_scale"] = reshaped(magnitude, (*magnitude.shape, 1)) if len(magnitude.shape) == 1 else magnitude
    parts = {k: t for k, t in parts.items() if k not in ("diff_b", "b_norm")}
    try:
        return file.from_lycoris(parts, scale.alpha, name=module.name)
    except FormatError as error:
        raise NotReadError("; ".join([error.message, *error.details])) from error
    except UnsupportedError as error:
        raise NotReadError(error.message, unsupported=True) from error


def _lora(module: Module, scale: Scale) -> Update:
    a, b, mid = _part(module, "A", "B"), _part(module, "B", "A"), module.parts.get("mid")

    def shapes() -> str:
        return f"{quoted(module.name)} has {module.keys['A']} {list(a.shape)} and {module.keys['B']} {list(b.shape)}"

    if len(a.shape) < 2 or len(b.shape) < 2 or 0 in (*a.shape, *b.shape):
        raise NotReadError(f"{shapes()}: empty, or no matrices")
    if a.shape[0] != b.shape[1] or any(size != 1 for size in b.shape[2:]):
        raise NotReadError(f"{shapes()}, which make no product")
    if mid is not None and (mid.shape[:2] != (a.shape[0], b.shape[1]) or any(size != 1 for size in a.shape[2:])):
        raise NotReadError(f"{shapes()}, and a core {list(mid.shape)} that does not go between them")
    for part, tensor in module.parts.items():
        if part != "alpha" and not is_floating(tensor.dtype):
            raise NotReadError(
                f"{quoted(module.keys[part])} has dtype {tensor.dtype}; a floating-point tensor is needed"
            )
    # Trainers take an alpha of 0 for the rank, too.
    alpha = scale.alpha or float(a.shape[0])
    magnitude = module.parts.get("magnitude")
    if magnitude is None:
        return LoRA(a, b, alpha, scale.source, scale.rslora, mid=mid)
    of = _magnitude_of(magnitude, b.shape[0], a.shape[1], peft="lora_magnitude_vector" in module.keys["magnitude"])
    if of is None:
        raise NotReadError(
            f"{shapes()}, and a magnitude {list(magnitude.shape)} that is neither of outputs nor of inputs"
        )
    return LoRA(
        a,
        b,
        alpha,
        scale.source,
        scale.rslora,
        mid=mid,
        magnitude=reshaped(magnitude, (magnitude.elements,)),
        magnitude_of=of,
    )


def _magnitude_of(magnitude: LazyTensor, out: int, into: int, *, peft: bool) -> Literal["out", "in"] | None:
    """LyCORIS says the axis by the shape: (out, 1...) or (1, in, 1...). PEFT has outputs, also as (1, out, 1...)."""
    shape = magnitude.shape
    if magnitude.elements == out and (peft or shape[0] == out):
        return "out"
    if not peft and len(shape) > 1 and shape[0] == 1 and magnitude.elements == shape[1] == into:
        return "in"
    return None


def _full(module: Module, scale: Scale) -> Update:
    return Full(module.parts["diff"])


def _part(module: Module, part: str, present: str) -> LazyTensor:
    if part not in module.parts:
        raise NotReadError(f"{quoted(module.keys.get(present, module.name))} has no partner: factor {part} is missing")
    return module.parts[part]


_READERS: Mapping[str, Callable[[Module, Scale], Update]] = {"lora": _lora, "full": _full}
