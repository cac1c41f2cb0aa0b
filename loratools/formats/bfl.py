"""BFL: the authors' own names with no prefix at all, as the control LoRAs of Flux have them, with trained norms.

double_blocks.0.img_attn.qkv.lora_A.weight
double_blocks.0.img_attn.norm.key_norm.scale        the norm of the tuned model, whole
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from loratools.adapter import Adapter, Replacement
from loratools.errors import UnsupportedError
from loratools.formats.common.base import Base
from loratools.formats.common.source import AdapterSource
from loratools.formats.image_parts.flat_names import empty_modules_warning
from loratools.formats.image_parts.flux_blocks import BLOCKS, are_of_flux
from loratools.formats.image_parts.reading import DENOISER, Located, Read
from loratools.formats.image_parts.reading import read as read_image
from loratools.formats.image_parts.spellings import grouped, is_spelled
from loratools.formats.image_parts.writing import (
    Stored,
    header_of,
    lay_out,
    lora_parts,
    pieces_alone,
    plain_alpha,
    write_file,
)
from loratools.naming.image.families import flux, flux2
from loratools.naming.image.family import Family
from loratools.storage.casting import cast
from loratools.tensors.lazy import LazyTensor, from_torch

WRITES = ".safetensors"
_NORM = ".scale"
_FAMILIES = (flux.FAMILY, flux2.FAMILY)
# Before names in files for Flux Kontext that were trained with PEFT and saved without its config.
_PEFT = "base_model.model."


def detect(source: AdapterSource) -> bool:
    """By blocks of Flux with nothing before them, and factors as PEFT or kohya spells them; not PEFT's folders."""
    if source.config_belongs_to_file:
        return False
    if not any(_is_bare(key) for key in source.tensors):
        return False
    modules = grouped(source.tensors)[0]
    return are_of_flux([name.removeprefix(_PEFT) for name, module in modules.items() if module.kinds], source.base)


def read(source: AdapterSource, *, rank_from: str | None = None) -> Adapter:
    """The adapter; norms are replacements under the names of diffusers. Raises what `image_parts.reading.read` does."""
    norms = {key: tensor for key, tensor in source.tensors.items() if key.endswith(_NORM)}
    factors = {key: tensor for key, tensor in source.tensors.items() if key not in norms}
    file_layout = Read("bfl", _locate, table_names_only=True, families=_FAMILIES)
    adapter = read_image(replace(source, tensors=factors, stored_names=False), file_layout)
    replaced: dict[str, Replacement] = {}
    for key, tensor in norms.items():
        module = key.removeprefix(_PEFT).removesuffix(_NORM)
        place = next((p for family in _FAMILIES if (p := family.find(module))), None)
        if place is None:
            raise UnsupportedError(f"'{key}' is no norm of Flux that is known here")
        replaced[f"transformer.{place.targets[0]}.weight"] = Replacement(tensor, "unlisted")
    return replace(adapter, replacements=replaced)


def unwritable(adapter: Adapter, *, base: Base | None = None) -> Mapping[str, str]:
    """Names that cannot be written, and why."""
    layout = lay_out(adapter, "original", base=base, dry=True)
    problems = dict(layout.problems)
    for name, update in adapter.updates.items():
        if name.partition(".")[0] != "transformer":
            problems[name] = "only the transformer has a place"
        elif update.as_full() is None and ((lora := update.as_lora()) is None or lora.magnitude is not None):
            problems[name] = "only plain LoRA and its biases have a place"
    if layout.family is not None and layout.family.name not in {f.name for f in _FAMILIES}:
        problems |= dict.fromkeys(adapter.updates, "of a model that is not Flux")
    for name in adapter.replacements:
        if _norm_name(layout.family, name) is None:
            problems[name] = "a whole weight, and no norm of Flux"
    return problems


def write(adapter: Adapter, out: Path, *, dtype: str | None, base: Base | None = None) -> tuple[str, ...]:
    """Write the file. There is no place for alpha but a tensor, which is written where the scale is not 1."""
    import torch

    layout = lay_out(adapter, "original", base=base)
    modules, empty = pieces_alone(layout.modules)
    parts: dict[str, LazyTensor] = {}
    alphas: Stored = {}
    for module in modules:
        if (lora := module.lora) is not None:
            factors = lora_parts(lora, keep_mid=False)
            parts |= {f"{module.name}.lora_{part}.weight": tensor for part, tensor in factors.items()}
            if plain_alpha(lora) != lora.rank:
                alphas[f"{module.name}.alpha"] = from_torch(torch.tensor(plain_alpha(lora)))
        if module.bias is not None:
            parts[f"{module.name}.lora_B.bias"] = module.bias.diff
    for name, replacement in adapter.replacements.items():
        parts[str(_norm_name(layout.family, name))] = replacement.tensor
    stored = alphas | {key: cast(key, tensor, dtype) for key, tensor in parts.items()}
    write_file(out, stored, header_of(adapter, layout.family))
    return empty_modules_warning(empty)


def _is_bare(key: str) -> bool:
    bare = key.removeprefix(_PEFT)
    return bare.startswith(BLOCKS) and is_spelled(key)


def _locate(name: str) -> Located:
    return Located(DENOISER, name.removeprefix(_PEFT))


def _norm_name(family: Family | None, name: str) -> str | None:
    back = family.back(name.removeprefix("transformer.").removesuffix(".weight"), "original") if family else None
    return None if back is None or "norm" not in back.name else f"{back.name}{_NORM}"
