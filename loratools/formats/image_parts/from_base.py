"""What an extraction found, under the names that image formats have: those of diffusers, after the part of a pipeline.

A single file has the names of the authors, a folder of one component those of diffusers with no part before them.
"""

from __future__ import annotations

from dataclasses import replace

from loratools.adapter import Adapter, Replacement
from loratools.formats.common.base import Base
from loratools.formats.common.source import counted
from loratools.formats.image_parts.fused import apart
from loratools.formats.image_parts.notes import NOTES
from loratools.naming.image.resolving import DENOISER_PREFIXES, base_families
from loratools.updates.parts.protocol import Update

# Formats whose names are not those of a base's own modules.
IMAGE_FORMATS = ("bare", "bfl", "comfy", "diffusers", "kohya", "lycoris", "onetrainer", "xlabs")
# The part that makes pixels of latents: no adapter of these formats has a place for it.
_AUTOENCODER = ("first_stage_model.", "vae.")


def named_by_base(adapter: Adapter, base: Base) -> Adapter:
    """The adapter of a base of image models with canonical names; any other, and names in no table, as they are.

    Args:
        adapter: With the names of the base's own modules.
        base: What is known of the base.

    Returns:
        The adapter without updates of the autoencoder, which a warning counts.
    """
    families = base_families(base.shapes, base.config)
    if not families:
        return adapter
    family = families[0]
    prefix = next(p for p in DENOISER_PREFIXES if any(name.startswith(p) for name in base.shapes))
    updates: dict[str, Update] = {}
    replacements: dict[str, Replacement] = {}
    autoencoder_names = [n for n in (*adapter.updates, *adapter.replacements) if n.startswith(_AUTOENCODER)]
    for name, update in adapter.updates.items():
        if name.startswith(_AUTOENCODER):
            continue
        place = family.find(name.removeprefix(prefix)) if name.startswith(prefix) else None
        columns = update.shape[1] if len(update.shape) > 1 else None
        pieces = None if place is None else apart(update, place, columns=columns)
        if place is None:
            updates[name] = update
        elif pieces is None:
            updates[f"{family.component}.{place.name}"] = update
        else:
            updates |= {f"{family.component}.{target}": piece for target, piece in pieces.items()}
    for name, replacement in adapter.replacements.items():
        if name.startswith(_AUTOENCODER):
            continue
        module, _, leaf = name.removeprefix(prefix).rpartition(".")
        place = family.find(module) if name.startswith(prefix) else None
        has_one_target = place is not None and len(place.targets) == 1 and not place.may_swap
        canonical = f"{family.component}.{place.targets[0]}.{leaf}" if place is not None and has_one_target else name
        replacements[canonical] = replacement
    warnings = adapter.warnings
    if autoencoder_names:
        warnings += (
            f"{counted(len(autoencoder_names), 'weight')} of the autoencoder left out: {autoencoder_names[0]}, ...",
        )
    named = family.name if len(families) == 1 else None
    return replace(
        adapter,
        updates=updates,
        replacements=replacements,
        warnings=warnings,
        notes={**adapter.notes, NOTES: {"metadata": {}, "family": named, "source": "base"}},
    )
