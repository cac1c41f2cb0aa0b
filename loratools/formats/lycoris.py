"""LyCORIS around a diffusers model: names flattened after `lycoris_`, as SimpleTuner and others save.

LyCORIS inside of kohya's trainers writes `lora_unet_`, and is read as kohya.
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
    "lycoris",
    ("lycoris_",),
    lambda family: "diffusers",
    refused=(("text_encoder", "of a text encoder, in a file for one model"),),
)


def detect(source: AdapterSource) -> bool:
    """By `lycoris_` before the names."""
    return _PREFIXES.claims(source.tensors)


def read(source: AdapterSource, *, rank_from: str | None = None) -> Adapter:
    """The adapter; raises the same errors as `image_parts.reading.read`."""
    return flat_names.read(source, _PREFIXES)


def unwritable(adapter: Adapter, *, base: Base | None = None) -> Mapping[str, str]:
    """Names that cannot be written, and why: it wraps one model, so text encoders have no place."""
    return flat_names.unwritable(adapter, _PREFIXES, base=base)


def write(adapter: Adapter, out: Path, *, dtype: str | None, base: Base | None = None) -> tuple[str, ...]:
    """Write the file that `lycoris.create_lycoris_from_weights` reads."""
    return flat_names.write(adapter, out, _PREFIXES, dtype=dtype, base=base, encoders={})
