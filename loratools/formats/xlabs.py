"""XLabs: Flux LoRA on attention processors, `double_blocks.N.processor.qkv_lora1.down.weight`; no alpha, a scale of 1.

1 is the image and 2 the text. Of a single block, the factors of q, k and v leave out the MLP in the same layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from loratools.adapter import Adapter
from loratools.formats.common.base import Base
from loratools.formats.common.scale import at_scale
from loratools.formats.common.source import AdapterSource
from loratools.formats.image_parts.flat_names import empty_modules_warning
from loratools.formats.image_parts.fused import fused
from loratools.formats.image_parts.reading import Located, Read
from loratools.formats.image_parts.reading import read as read_image
from loratools.formats.image_parts.writing import Stored, header_of, write_file
from loratools.naming.image.families.flux import FAMILY
from loratools.naming.image.family import Place
from loratools.storage.casting import cast
from loratools.updates.lora import LoRA

WRITES = ".safetensors"
_KEY = re.compile(
    r"(?:diffusion_model\.)?((double|single)_blocks)\.(\d+)\.processor\.(qkv|proj)_lora([12]?)\.(down|up)\.weight"
)
_QKV = {"1": ("to_q", "to_k", "to_v"), "2": ("add_q_proj", "add_k_proj", "add_v_proj"), "": ("to_q", "to_k", "to_v")}
_OUT = {"1": "attn.to_out.0", "2": "attn.to_add_out", "": "proj_out"}
_SPELLED = {"down": "lora_down", "up": "lora_up"}


def detect(source: AdapterSource) -> bool:
    """By `processor.qkv_lora` and `processor.proj_lora` in blocks of Flux."""
    return any(_KEY.fullmatch(key) for key in source.tensors)


def read(source: AdapterSource, *, rank_from: str | None = None) -> Adapter:
    """The adapter; raises the same errors as `image_parts.reading.read`."""
    renamed = {_common(key): tensor for key, tensor in source.tensors.items()}
    return read_image(replace(source, tensors=renamed, stored_names=False), Read("xlabs", _locate, families=(FAMILY,)))


def unwritable(adapter: Adapter, *, base: Base | None = None) -> Mapping[str, str]:
    """Names that cannot be written, and why: only attention of Flux has a place."""
    places = _places(adapter)
    problems = {name: "XLabs has attention of Flux only" for name in adapter.updates if name not in places}
    for name, update in adapter.updates.items():
        lora = update.as_lora()
        if name in places and (lora is None or lora.magnitude is not None or lora.mid is not None):
            problems[name] = "only plain LoRA has a place"
    return problems | dict.fromkeys(adapter.replacements, "a whole weight in place of the base's")


def write(adapter: Adapter, out: Path, *, dtype: str | None, base: Base | None = None) -> tuple[str, ...]:
    """Write the file. There is no place for alpha, so that B gets what the scale is not 1 by."""
    places = _places(adapter)
    stored: Stored = {}
    together: dict[str, dict[str, LoRA]] = {}
    for target, update in adapter.updates.items():
        lora = update.as_lora()
        assert lora is not None
        together.setdefault(places[target].name, {})[target] = lora
    for name, members in sorted(together.items()):
        place = next(p for p in places.values() if p.name == name)
        first = next(iter(members.values()))
        gaps = [None if t in members else first.shape[0] for t in place.targets]
        plain = at_scale(name, fused(members, place, gaps), 1.0, dtype)
        stored[f"{name}.down.weight"] = cast(name, plain.a, dtype)
        stored[f"{name}.up.weight"] = cast(name, plain.b, dtype)
    write_file(out, stored, header_of(adapter, FAMILY))
    return empty_modules_warning([])


def _common(key: str) -> str:
    """The key with the suffix that other files have."""
    stem, dot, weight = key.rpartition(".")
    head, _, part = stem.rpartition(".")
    return f"{head}.{_SPELLED[part]}{dot}{weight}" if _KEY.fullmatch(key) else key


def _locate(module: str) -> Located | None:
    parsed = _KEY.fullmatch(f"{module}.down.weight")
    if parsed is None:
        return None
    blocks, kind, number, layer, stream = parsed[1], parsed[2], parsed[3], parsed[4], parsed[5]
    if (kind == "double") != bool(stream):
        return None
    return Located("transformer", module, place=_place(module, blocks, number, layer, stream))


def _place(name: str, blocks: str, number: str, layer: str, stream: str) -> Place:
    block = f"{'single_' if blocks.startswith('single') else ''}transformer_blocks.{number}"
    if layer == "proj":
        return Place(name, (f"{block}.{_OUT[stream]}",))
    return Place(name, tuple(f"{block}.attn.{leaf}" for leaf in _QKV[stream]), split="thirds")


def _places(adapter: Adapter) -> dict[str, Place]:
    """Canonical name -> where XLabs has it, for every name of `adapter` that it has."""
    places: dict[str, Place] = {}
    for target in adapter.updates:
        block = re.match(r"transformer\.(single_)?transformer_blocks\.(\d+)\.", target)
        if block is None:
            continue
        kind, number = ("single", block[2]) if block[1] else ("double", block[2])
        for layer in ("qkv", "proj"):
            for stream in ("",) if block[1] else ("1", "2"):
                name = f"{kind}_blocks.{number}.processor.{layer}_lora{stream}"
                place = _place(name, f"{kind}_blocks", number, layer, stream)
                if target.removeprefix("transformer.") in place.targets:
                    places[target] = replace(place, targets=tuple(f"transformer.{t}" for t in place.targets))
    return places
