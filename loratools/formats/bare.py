"""Bare: names of the model with nothing before them, as DiffSynth-Studio, Lightning and LyCORIS's LoKr files have them.

    layers.0.attention.to_q.lora_A.default.weight      DiffSynth-Studio
    transformer_blocks.0.attn.to_q.lora_down.weight    Qwen-Image-Lightning

Names are the authors' or those of diffusers, of a model with a table. FLUX in its authors' names is `bfl`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loratools.adapter import Adapter
from loratools.errors import LoraToolsError
from loratools.formats.common.base import Base
from loratools.formats.common.source import AdapterSource
from loratools.formats.image_parts.flat_names import empty_modules_warning, spelled, without_spelling
from loratools.formats.image_parts.flux_blocks import BLOCKS, are_of_flux
from loratools.formats.image_parts.reading import DENOISER, Located, Read, given_base
from loratools.formats.image_parts.reading import read as read_image
from loratools.formats.image_parts.spellings import grouped
from loratools.formats.image_parts.writing import Stored, header_of, lay_out, pieces_alone, write_file
from loratools.naming.image.evidence import decide, denoisers

WRITES = ".safetensors"


def detect(source: AdapterSource) -> bool:
    """By names with nothing before them that are surely those of an image model, and no config of PEFT.

    A given base makes names sure that some image model has, whether it is the right one or not: reading tells.
    """
    if source.config_belongs_to_file:
        return False
    modules = {name: module for name, module in grouped(source.tensors)[0].items() if module.kinds}
    # The first name rules most families out, and all of them for a language model.
    families = [family for family in denoisers() if modules and family.find(next(iter(modules))) is not None]
    # `bfl` and `xlabs` read the names of FLUX.
    if not families or (any(name.startswith(BLOCKS) for name in modules) and are_of_flux(modules, source.base)):
        return False
    try:
        decide({name: module.sizes for name, module in modules.items()}, families)
    except LoraToolsError:
        known = any(all(family.find(name) is not None for name in modules) for family in families)
        return known and given_base(source.base) is not None
    return True


def read(source: AdapterSource, *, rank_from: str | None = None) -> Adapter:
    """The adapter; raises the same errors as `image_parts.reading.read`."""
    return read_image(source, Read("bare", _locate))


def unwritable(adapter: Adapter, *, base: Base | None = None) -> Mapping[str, str]:
    """Names that cannot be written, and why: there is a place for one model only."""
    layout = lay_out(adapter, "original", base=base, dry=True)
    problems = dict(layout.problems) | without_spelling(adapter)
    parts = {module.part for module in layout.modules if module.part}
    for module in layout.modules:
        if module.part.startswith("text_encoder"):
            problems[module.target] = f"of one of {len(parts)} models, in a file for what removes the noise"
    return problems | dict.fromkeys(adapter.replacements, "a whole weight in place of the base's")


def write(adapter: Adapter, out: Path, *, dtype: str | None, base: Base | None = None) -> tuple[str, ...]:
    """Write the file with the authors' names and the parts as kohya spells them, alpha as a tensor."""
    layout = lay_out(adapter, "original", base=base)
    modules, empty = pieces_alone(layout.modules)
    stored: Stored = {}
    for module in modules:
        stored |= spelled(module.named(""), module, dtype=dtype)
    write_file(out, stored, header_of(adapter, layout.family))
    return empty_modules_warning(empty)


def _locate(name: str) -> Located:
    return Located(DENOISER, name)
