"""kohya: one file of sd-scripts or musubi-tuner, names flattened after `lora_unet_` and `lora_te_`, alpha a tensor.

Stable Diffusion 1 and 2 with the names of diffusers, XL with those of LDM, transformers with those of their authors.
OFT of sd-scripts is under `oft_unet_`; its rotations are those of LyCORIS. Stable Cascade has `lora_prior_unet_`, and
Tencent's trainer for HunyuanVideo from images `Hunyuan_video_I2V_lora_`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loratools.adapter import Adapter
from loratools.formats.common.base import Base
from loratools.formats.common.source import AdapterSource
from loratools.formats.image_parts import flat_names
from loratools.formats.image_parts.reading import given_base
from loratools.formats.image_parts.spellings import is_spelled
from loratools.formats.image_parts.writing import family_of, noted_family
from loratools.naming.image.evidence import family_named

WRITES = ".safetensors"
_PREFIXES = flat_names.Prefixes(
    "kohya",
    ("lora_unet_", "lora_unet__", "oft_unet_", "lora_prior_unet_", "Hunyuan_video_I2V_lora_"),
    lambda family: family.kohya,
    single_file=True,
)
# Prefixes of one model alone.
_FAMILIES = {"Hunyuan_video_I2V_lora_": "hunyuan-video"}


def detect(source: AdapterSource) -> bool:
    """By a prefix of kohya's trainers and of those that came from them, and by none of the prefixes of relatives."""
    if any(key.startswith(("lora_transformer_", "lycoris_")) for key in source.tensors):
        return False
    prefixes = (*_PREFIXES.denoiser, "lora_te", "lora_prior_te_")
    return any(key.startswith(prefixes) and is_spelled(key) for key in source.tensors)


def read(source: AdapterSource, *, rank_from: str | None = None) -> Adapter:
    """The adapter; raises the same errors as `image_parts.reading.read`."""
    families = [name for prefix, name in _FAMILIES.items() if any(key.startswith(prefix) for key in source.tensors)]
    return flat_names.read(source, _PREFIXES, families=tuple(map(family_named, families)))


def unwritable(adapter: Adapter, *, base: Base | None = None) -> Mapping[str, str]:
    """Names that cannot be written, and why."""
    return flat_names.unwritable(adapter, _PREFIXES, base=base)


def write(adapter: Adapter, out: Path, *, dtype: str | None, base: Base | None = None) -> tuple[str, ...]:
    """Write the file that sd-scripts, musubi-tuner, ComfyUI and the like read."""
    return flat_names.write(adapter, out, _PREFIXES, dtype=dtype, base=base, encoders=_encoders(adapter, base))


def _encoders(adapter: Adapter, base: Base | None) -> Mapping[str, str]:
    parts = {target.partition(".")[0] for target in adapter.updates}
    name = _family_name(adapter, parts, base)
    # One text encoder is not numbered. Of Flux, T5 is the third.
    only_encoder = name in ("sd", "lumina2") or (not name and "text_encoder_2" not in parts)
    second = "lora_te3_" if name == "flux" else "lora_te2_"
    return {
        "text_encoder": "lora_te_" if only_encoder else "lora_te1_",
        "text_encoder_2": second,
        "text_encoder_3": "lora_te3_",
    }


def _family_name(adapter: Adapter, parts: set[str], base: Base | None) -> str:
    """The name of the adapter's family; empty where its names are of no family, or of a text encoder of any."""
    denoiser = next((part for part in ("unet", "transformer") if part in parts), None)
    if denoiser is not None:
        return family_of(adapter, denoiser, base, spelling=_PREFIXES.spelling).name
    named_base = given_base(base)
    family = noted_family(adapter) or (None if named_base is None else named_base.family)
    return "" if family is None else family.name
