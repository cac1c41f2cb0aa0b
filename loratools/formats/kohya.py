"""kohya: one file of sd-scripts or musubi-tuner, names flattened after `lora_unet_` and `lora_te_`, alpha a tensor.

Stable Diffusion 1 and 2 with the names of diffusers, XL with those of LDM, transformers with those of their authors.
OFT of sd-scripts is under `oft_unet_`; its rotations are those of LyCORIS.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loratools.adapter import Adapter
from loratools.formats.common.base import Base
from loratools.formats.common.source import AdapterSource
from loratools.formats.image_parts import flat_names
from loratools.formats.image_parts.spellings import is_spelled
from loratools.formats.image_parts.writing import family_of
from loratools.naming.image.family import Family

WRITES = ".safetensors"
_PREFIXES = flat_names.Prefixes(
    "kohya", ("lora_unet_", "lora_unet__", "oft_unet_"), lambda family: family.kohya, single_file=True
)


def detect(source: AdapterSource) -> bool:
    """By `lora_unet_`, `oft_unet_` or `lora_te` before the names, and none of the prefixes of its relatives."""
    if any(key.startswith(("lora_transformer_", "lycoris_")) for key in source.tensors):
        return False
    return any(key.startswith(("lora_unet_", "oft_unet_", "lora_te")) and is_spelled(key) for key in source.tensors)


def read(source: AdapterSource, *, rank_from: str | None = None) -> Adapter:
    """The adapter; raises the same errors as `image_parts.reading.read`."""
    return flat_names.read(source, _PREFIXES)


def unwritable(adapter: Adapter, *, base: Base | None = None) -> Mapping[str, str]:
    """Names that cannot be written, and why."""
    return flat_names.unwritable(adapter, _PREFIXES, base=base)


def write(adapter: Adapter, out: Path, *, dtype: str | None, base: Base | None = None) -> tuple[str, ...]:
    """Write the file that sd-scripts, musubi-tuner, ComfyUI and the like read."""
    return flat_names.write(adapter, out, _PREFIXES, dtype=dtype, base=base, encoders=_encoders(adapter, base))


def _encoders(adapter: Adapter, base: Base | None) -> Mapping[str, str]:
    parts = {target.partition(".")[0] for target in adapter.updates}
    family = family_of(adapter, next(iter(parts & {"unet", "transformer"}), "unet"), base)
    name = family.name if isinstance(family, Family) else ""
    # One text encoder is not numbered. Of Flux, T5 is the third.
    alone = name == "sd" or (not parts & {"unet", "transformer"} and "text_encoder_2" not in parts)
    second = "lora_te3_" if name == "flux" else "lora_te2_"
    return {
        "text_encoder": "lora_te_" if alone or name in ("lumina2",) else "lora_te1_",
        "text_encoder_2": second,
        "text_encoder_3": "lora_te3_",
    }
