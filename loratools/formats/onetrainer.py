"""OneTrainer: names of diffusers flattened after `lora_transformer_`, projections apart, text encoders as kohya's.

Its files for UNets are kohya's, and read as such. Of Flux, it counts T5 as the second text encoder, as diffusers does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loratools.adapter import Adapter
from loratools.formats.common.base import Base
from loratools.formats.common.source import AdapterSource
from loratools.formats.image_parts import flat_names

WRITES = ".safetensors"
_PREFIXES = flat_names.Prefixes(
    "onetrainer",
    ("lora_transformer_",),
    lambda family: "diffusers",
    refused=(("unet.", "of a UNet, which OneTrainer stores as kohya does: --to kohya"),),
)


def detect(source: AdapterSource) -> bool:
    """By `lora_transformer_` before the names."""
    return _PREFIXES.claims(source.tensors)


def read(source: AdapterSource, *, rank_from: str | None = None) -> Adapter:
    """The adapter; raises the same errors as `image_parts.reading.read`."""
    return flat_names.read(source, _PREFIXES)


def unwritable(adapter: Adapter, *, base: Base | None = None) -> Mapping[str, str]:
    """Names that cannot be written, and why: those of UNets go to kohya."""
    return flat_names.unwritable(adapter, _PREFIXES, base=base)


def write(adapter: Adapter, out: Path, *, dtype: str | None, base: Base | None = None) -> tuple[str, ...]:
    """Write the file that OneTrainer reads and ComfyUI too."""
    encoders = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}
    return flat_names.write(adapter, out, _PREFIXES, dtype=dtype, base=base, encoders=encoders)
