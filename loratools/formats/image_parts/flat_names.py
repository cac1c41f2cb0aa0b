"""Files whose keys are module names with underscores for their dots, after a prefix for the part of the pipeline.

    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight
    lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha

kohya, LyCORIS and OneTrainer have this in common; they differ in prefixes and in whose names they flatten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from loratools.adapter import Adapter
from loratools.formats.common.base import Base
from loratools.formats.common.source import AdapterSource, counted, shown
from loratools.formats.image_parts.kinds import lycoris_parts
from loratools.formats.image_parts.reading import DENOISER, Located, Read
from loratools.formats.image_parts.reading import read as read_image
from loratools.formats.image_parts.spellings import difference_key, is_spelled
from loratools.formats.image_parts.writing import (
    Stored,
    Written,
    axis_magnitude,
    had_hashes,
    header_of,
    lay_out,
    lora_parts,
    pieces_alone,
    plain_alpha,
    write_file,
)
from loratools.naming.image.evidence import denoisers
from loratools.naming.image.families.wan import MODULATION_TABLE
from loratools.naming.image.family import Family
from loratools.storage.casting import cast
from loratools.storage.files import quoted
from loratools.tensors.lazy import LazyTensor, from_torch

_TEXT = {
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te_": "text_encoder",
    # Of Stable Cascade: no part of the pipelines whose names are written here.
    "lora_prior_te_": "prior_text_encoder",
}


@dataclass(frozen=True)
class Prefixes:
    """What stands before the names: of the denoiser (the first is written), and of text encoders.

    spelling      which names of a family are written
    single_file   whether the names of a single file that is in no table are written as they are
    refused       beginnings of names that the format does not hold, and why
    """

    format: str
    denoiser: tuple[str, ...]
    spelling: Callable[[Family], str]
    single_file: bool = False
    refused: tuple[tuple[str, str], ...] = ()

    @cached_property
    def _longest_first(self) -> tuple[str, ...]:
        return tuple(sorted(self.denoiser, key=len, reverse=True))

    def claims(self, keys: Iterable[str]) -> bool:
        """Whether any key has a prefix that no other format has."""
        return any(key.startswith(self.denoiser) and is_spelled(key) for key in keys)

    def locate(self, name: str) -> Located | None:
        # Longest first, so that `lora_unet__` (VideoX-Fun) is not taken for `lora_unet_`.
        for prefix in self._longest_first:
            if name.startswith(prefix):
                return Located(DENOISER, name.removeprefix(prefix), flat=True)
        for prefix, part in _TEXT.items():
            if name.startswith(prefix):
                return Located(part, name.removeprefix(prefix), flat=True)
        return None


def read(source: AdapterSource, prefixes: Prefixes, *, families: Iterable[Family | None] = ()) -> Adapter:
    """The adapter; raises the same errors as `image_parts.reading.read`.

    Args:
        source: The file.
        prefixes: What stands before the names.
        families: The ones that a prefix names; any, if empty.
    """
    candidates = tuple(family for family in families if family is not None) or denoisers()
    file_layout = Read(prefixes.format, prefixes.locate, encoder_part, table_names_only=True, families=candidates)
    return read_image(source, file_layout)


def encoder_part(part: str, family: Family | None) -> str:
    """Of Flux, kohya counts T5 as the third text encoder and diffusers as the second: there is no other between."""
    return "text_encoder_2" if part == "text_encoder_3" and family is not None and family.name == "flux" else part


def unwritable(adapter: Adapter, prefixes: Prefixes, *, base: Base | None) -> dict[str, str]:
    """Names that cannot be written, and why."""
    layout = lay_out(adapter, prefixes.spelling, base=base, dry=True, single_file=prefixes.single_file)
    problems = dict(layout.problems)
    problems |= without_spelling(adapter)
    problems |= dict.fromkeys(adapter.replacements, "a whole weight in place of the base's")
    for beginning, reason in prefixes.refused:
        problems |= dict.fromkeys((name for name in adapter.updates if name.startswith(beginning)), reason)
    # Readers of these names look for modules, and find none of this name.
    parameters = [name for name in adapter.updates if name.endswith(f".{MODULATION_TABLE}")]
    if not adapter.stored_names:
        problems |= dict.fromkeys(parameters, "a parameter and no module, which has no name here; comfy has one for it")
    return problems


def without_spelling(adapter: Adapter) -> dict[str, str]:
    """Updates for which neither kohya nor LyCORIS nor ComfyUI has a spelling, and why."""
    problems: dict[str, str] = {}
    for name, update in adapter.updates.items():
        if name.startswith("transformer_2."):
            problems[name] = (
                "of a second transformer, which has a file of its own: --include 'transformer_2.*' writes it alone"
            )
        elif update.as_lora() is not None and update.embedding:
            problems[name] = "LoRA of an embedding"
        elif update.as_lora() is None and update.as_full() is None and lycoris_parts(update) is None:
            problems[name] = f"{update.kind}, which is not written here"
    return problems


def write(
    adapter: Adapter,
    out: Path,
    prefixes: Prefixes,
    *,
    dtype: str | None,
    base: Base | None,
    encoders: Mapping[str, str],
) -> tuple[str, ...]:
    """Write the file. encoders: prefix by part of the pipeline."""
    layout = lay_out(adapter, prefixes.spelling, base=base, single_file=prefixes.single_file)
    modules, empty = pieces_alone(layout.modules)
    stored: Stored = {}
    for module in modules:
        prefix = encoders.get(module.part, prefixes.denoiser[0])
        stored |= spelled(module.named(prefix, flat=True), module, dtype=dtype)
    write_file(out, stored, header_of(adapter, layout.family), hashed=had_hashes(adapter))
    return empty_modules_warning(empty)


def empty_modules_warning(empty: list[str]) -> tuple[str, ...]:
    """What to say of modules in which nothing changes."""
    if not empty:
        return ()
    names = ", ".join(shown([quoted(name) for name in empty]))
    return (f"{counted(len(empty), 'module')} left out, where nothing changes: {names}",)


def spelled(name: str, module: Written, *, dtype: str | None) -> Stored:
    """A module's tensors as kohya and LyCORIS spell them; alpha as float32, which holds every one exactly enough."""
    import torch

    tensors: dict[str, LazyTensor] = {}
    alpha: LazyTensor | None = None
    full = None if module.weight is None else module.weight.as_full()
    if (lora := module.lora) is not None:
        parts = lora_parts(lora, keep_mid=True)
        spellings = {"A": "lora_down.weight", "B": "lora_up.weight", "mid": "lora_mid.weight"}
        tensors |= {f"{name}.{spellings[part]}": tensor for part, tensor in parts.items()}
        if (magnitude := axis_magnitude(lora)) is not None:
            tensors[f"{name}.dora_scale"] = magnitude
        alpha = from_torch(torch.tensor(plain_alpha(lora)))
    elif module.weight is not None and full is None:
        tensors |= {f"{name}{suffix}": tensor for suffix, tensor in (lycoris_parts(module.weight) or {}).items()}
        if (alpha_value := module.weight.lycoris_alpha()) is not None:
            alpha = from_torch(torch.tensor(alpha_value))
    norm = full is not None and len(full.shape) == 1
    if full is not None:
        tensors[f"{name}.w_norm" if norm else difference_key(name)] = full.diff
    if module.bias is not None:
        tensors[f"{name}.{'b_norm' if norm else 'diff_b'}"] = module.bias.diff
    stored: Stored = {key: cast(key, tensor, dtype) for key, tensor in tensors.items()}
    return stored if alpha is None else stored | {f"{name}.alpha": alpha}
