"""A checkpoint as the library that wrote it has it in memory: the names of its modules, and experts fused.

transformers 5 names some modules otherwise in memory than in files, and holds the experts of a layer in one parameter.
An adapter is loaded into what is in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from loratools.checkpoints import Checkpoint
from loratools.naming.language.experts import fused_in_memory
from loratools.naming.language.renamed import names_in_memory
from loratools.naming.places import Alias, Place
from loratools.tensors.joined import block_matrix
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.views import reshaped

Tensors: TypeAlias = Mapping[str, LazyTensor]


def of_transformers_5(base: Checkpoint, tuned: Checkpoint) -> bool:
    """Whether transformers 5, which names some modules differently in memory and in files, wrote the models: the same
    version is assumed to load the adapter.
    """
    versions = [c.config.get("transformers_version") for c in (tuned, base)]
    major = next((v for v in versions if isinstance(v, str)), "").partition(".")[0]
    return major.isdigit() and int(major) >= 5


def targets_of(base: Checkpoint, names: Mapping[str, LazyTensor], *, in_memory: bool) -> dict[str, str]:
    """Name of a tensor -> its module as the trainer's library names it, which is what an adapter is loaded by; or its
    own name there, where it is neither a weight nor a bias."""
    renamed = names_in_memory(base.config, {name: t.shape for name, t in names.items()}) if in_memory else {}
    spoken = {stored: name for name, stored in renamed.items()}
    return {name: spoken.get(name, name).removesuffix(".weight").removesuffix(".bias") for name in names}


def with_fused_experts(config: Mapping[str, object], base: Tensors, tuned: Tensors) -> tuple[Tensors, Tensors]:
    """Both sides with the experts fused that are so in memory, where both have all of them."""
    fused: dict[str, Alias] = {}
    apart: set[str] = set()
    for name, alias in fused_in_memory(config, {n: t.shape for n, t in base.items()}).items():
        members = {place.weight for place in alias.places}
        sides = [[side[m] for m in sorted(members) if m in side] for side in (base, tuned)]
        complete = all(len(s) == len(members) and len({t.dtype for t in s}) == 1 for s in sides)
        plain = all(place == Place(place.weight, of=place.of) for place in alias.places)
        if complete and plain and all(base[m].shape == tuned[m].shape for m in members):
            fused[name] = alias
            apart |= members
    fused_base, fused_tuned = (
        {n: t for n, t in side.items() if n not in apart} | {n: _fused(alias, side) for n, alias in fused.items()}
        for side in (base, tuned)
    )
    return fused_base, fused_tuned


def _fused(alias: Alias, weights: Tensors) -> LazyTensor:
    """All experts' matrices as one tensor (experts, out, in)."""
    _, outputs, inputs = alias.shape
    blocks = [
        ((place.of.expert or 0) * outputs + (place.of.rows.start if place.of.rows else 0), 0, weights[place.weight])
        for place in alias.places
    ]
    return reshaped(block_matrix((alias.shape[0] * outputs, inputs), blocks), alias.shape)
