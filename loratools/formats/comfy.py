"""ComfyUI: the authors' own names after `diffusion_model.`, dots kept; also what ai-toolkit, musubi and others save.

Factors are spelled as PEFT does or as kohya does; alpha is a tensor, or absent for a scale of 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loratools.adapter import Adapter
from loratools.formats.common.base import Base
from loratools.formats.common.source import AdapterSource
from loratools.formats.image_parts.flat_names import empty_modules_warning, encoder_part, without_spelling
from loratools.formats.image_parts.kinds import lycoris_parts
from loratools.formats.image_parts.reading import DENOISER, Located, Read
from loratools.formats.image_parts.reading import read as read_image
from loratools.formats.image_parts.spellings import difference_key, is_spelled
from loratools.formats.image_parts.writing import (
    Stored,
    axis_magnitude,
    header_of,
    lay_out,
    lora_parts,
    pieces_alone,
    plain_alpha,
    write_file,
)
from loratools.naming.image.family import Family
from loratools.naming.image.pipeline import TEXT_ENCODERS
from loratools.storage.casting import cast
from loratools.tensors.lazy import LazyTensor, from_torch

WRITES = ".safetensors"
_PREFIX = "diffusion_model."
_TEXT = "text_encoders."
# What ComfyUI calls the text encoders, and where diffusers has them.
_ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
_INNER = ("transformer.", "model.", "")


def detect(source: AdapterSource) -> bool:
    """By `diffusion_model.` or `text_encoders.` before what is spelled as part of an update."""
    return any(is_spelled(key) and _locate(key) is not None for key in source.tensors)


def read(source: AdapterSource, *, rank_from: str | None = None) -> Adapter:
    """The adapter; raises the same errors as `image_parts.reading.read`."""
    return read_image(source, Read("comfy", _locate, encoder_part))


def unwritable(adapter: Adapter, *, base: Base | None = None) -> Mapping[str, str]:
    """Names that cannot be written, and why."""
    layout = lay_out(adapter, "comfy", base=base, dry=True, single_file=True)
    problems = dict(layout.problems) | without_spelling(adapter)
    family = layout.family.name if layout.family is not None else ""
    for name in () if adapter.stored_names else adapter.updates:
        if name.startswith(TEXT_ENCODERS) and _encoder(name.partition(".")[0], family) is None:
            problems[name] = "of a text encoder of which it is not known what ComfyUI calls it"
    for name in adapter.replacements:
        if _replaced(name, layout.family, stored=adapter.stored_names) is None:
            problems[name] = "a whole weight of a module that ComfyUI has no name for, or no own one"
    return problems


def write(adapter: Adapter, out: Path, *, dtype: str | None, base: Base | None = None) -> tuple[str, ...]:
    """Write the file that ComfyUI reads. Alpha is written where the scale is not 1, or where the source had it."""
    import torch

    layout = lay_out(adapter, "comfy", base=base, single_file=True)
    modules, empty = pieces_alone(layout.modules)
    family = layout.family.name if layout.family is not None else ""
    parts: dict[str, LazyTensor] = {}
    stored: Stored = {}
    named = {module.named(_prefix(module.part, family)): (module.weight, module.bias) for module in modules}
    for name, (weight, bias) in named.items():
        if weight is None:
            pass  # a bias alone
        elif (lora := weight.as_lora()) is not None:
            factors = lora_parts(lora, keep_mid=True)
            # Only kohya's spelling has a name for the core of a convolution.
            spelled = {"A": "lora_A", "B": "lora_B"} if "mid" not in factors else {"A": "lora_down", "B": "lora_up"}
            parts |= {f"{name}.{spelled.get(part, 'lora_mid')}.weight": t for part, t in factors.items()}
            if (magnitude := axis_magnitude(lora)) is not None:
                parts[f"{name}.dora_scale"] = magnitude
            alpha = plain_alpha(lora)
            if lora.alpha_source == "tensor" or alpha != lora.rank:
                stored[f"{name}.alpha"] = from_torch(torch.tensor(alpha))
        elif (full := weight.as_full()) is not None:
            parts[difference_key(name)] = full.diff
        else:
            parts |= {f"{name}{suffix}": tensor for suffix, tensor in (lycoris_parts(weight) or {}).items()}
            if (lycoris_alpha := weight.lycoris_alpha()) is not None:
                stored[f"{name}.alpha"] = from_torch(torch.tensor(lycoris_alpha))
        if bias is not None:
            parts[f"{name}.diff_b"] = bias.diff
    for name, replacement in adapter.replacements.items():
        parts[f"{_replaced(name, layout.family, stored=adapter.stored_names)}.set_weight"] = replacement.tensor
    stored |= {key: cast(key, tensor, dtype) for key, tensor in parts.items()}
    write_file(out, stored, header_of(adapter, layout.family))
    return empty_modules_warning(empty)


def _replaced(name: str, family: Family | None, *, stored: bool) -> str | None:
    """What ComfyUI calls the module whose weight is replaced; None if it has none of its own."""
    module = name.removesuffix(".weight")
    if stored or module.startswith(_PREFIX):
        return module
    back = family.back(module.partition(".")[2], "comfy") if family is not None else None
    return None if back is None or len(back.place.targets) > 1 or back.place.may_swap else f"{_PREFIX}{back.name}"


def _locate(name: str) -> Located | None:
    bare = name.removeprefix("model.") if name.startswith(f"model.{_PREFIX}") else name
    if bare.startswith(_PREFIX):
        return Located(DENOISER, bare.removeprefix(_PREFIX))
    if bare.startswith(_TEXT):
        encoder, _, module = bare.removeprefix(_TEXT).partition(".")
        inner = next(prefix for prefix in _INNER if module.startswith(prefix))
        return Located(_ENCODERS.get(encoder, "text_encoder"), module.removeprefix(inner)) if module else None
    return None


def _encoder(part: str, family: str) -> str | None:
    if part == "text_encoder_2" and family == "flux":
        return "t5xxl"
    if family in ("sd", "sdxl", "flux", "sd3", ""):
        return next((name for name, encoder in _ENCODERS.items() if encoder == part), None)
    return None


def _prefix(part: str, family: str) -> str:
    encoder = _encoder(part, family) if part in TEXT_ENCODERS else None
    return _PREFIX if encoder is None else f"{_TEXT}{encoder}.transformer."
