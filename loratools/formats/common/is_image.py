"""Whether names are those of image and video models: their files spell factors as PEFT does, which would claim them."""

from __future__ import annotations

from importlib import import_module

from loratools.formats.common.source import AdapterSource

# Formats that keep the dots of names.
_DOTTED = ("bare", "bfl", "comfy", "diffusers")


def is_image(source: AdapterSource) -> bool:
    """Whether one of the formats of image models claims the source."""
    return any(import_module(f"loratools.formats.{name}").detect(source) for name in _DOTTED)
