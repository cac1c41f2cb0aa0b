"""LyCORIS around a diffusers model: names flattened after `lycoris_`, as SimpleTuner and others save.

LyCORIS inside of kohya's trainers writes `lora_unet_`, and is read as kohya.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loratools.adapter import Adapter
from loratools.formats import _flat
from loratools.formats._base import Base
from loratools.formats._source import AdapterSource

WRITES = ".safetensors"
_PREFIXES = _flat.Prefixes("lycoris", ("lycoris_",), lambda family: "diffusers")


def detect(source: AdapterSource) -> bool:
    """By `lycoris_` before the names."""
    return _PREFIXES.claims(source.tensors)


def read(source: AdapterSource, *, rank_from: str | None = None) -> Adapter:
    """The adapter; errors as of `_image_read.read`."""
    return _flat.read(source, _PREFIXES)


def unwritable(adapter: Adapter, *, base: Base | None = None) -> Mapping[str, str]:
    """Names that cannot be written, and why: it wraps one model, so text encoders have no place."""
    found = dict(_flat.unwritable(adapter, _PREFIXES, base=base))
    encoders = [name for name in adapter.updates if name.startswith("text_encoder")]
    return found | dict.fromkeys(encoders, "of a text encoder, in a file for one model")


def write(adapter: Adapter, out: Path, *, dtype: str | None, base: Base | None = None) -> tuple[str, ...]:
    """Write the file that `lycoris.create_lycoris_from_weights` reads."""
    return _flat.write(adapter, out, _PREFIXES, dtype=dtype, base=base, encoders={})
