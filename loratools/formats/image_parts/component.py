"""Image adapters as PEFT has them: of one part of a pipeline, whose modules stand without the part's name.

PEFT wraps one model and saves the names of its modules; its config says the class of that model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loratools.adapter import Adapter
from loratools.formats.common.base import Base
from loratools.formats.image_parts.notes import NOTES
from loratools.formats.image_parts.reading import family_of_base
from loratools.naming.image.evidence import denoisers
from loratools.naming.image.family import Family
from loratools.naming.image.pipeline import DENOISERS, PIPELINE_PARTS

_COMPONENT = "component"
_SECOND = "transformer_2"


def without_component(adapter: Adapter) -> Adapter:
    """The adapter of one part of a pipeline, with the names of that model's own modules; any other as it is."""
    notes = adapter.notes.get(NOTES)
    parts = components(adapter)
    if len(parts) != 1 or not isinstance(notes, Mapping):
        return adapter
    (part,) = parts
    start = f"{part}."
    return replace(
        adapter,
        updates={name.removeprefix(start): update for name, update in adapter.updates.items()},
        replacements={name.removeprefix(start): r for name, r in adapter.replacements.items()},
        aliases={},
        stored_names=False,
        notes={**adapter.notes, NOTES: {**notes, _COMPONENT: part}},
    )


def second_as_first(adapter: Adapter) -> Adapter:
    """The adapter of a pipeline's second transformer alone, with the names that its file of one model has."""
    names = [*adapter.updates, *adapter.replacements]
    parts = {name.partition(".")[0] for name in names}
    if adapter.stored_names or not parts or {*DENOISERS} & parts != {_SECOND}:
        return adapter
    return replace(
        adapter,
        updates={_first(name): update for name, update in adapter.updates.items()},
        replacements={_first(name): replacement for name, replacement in adapter.replacements.items()},
    )


def _first(name: str) -> str:
    return f"transformer.{name.removeprefix(f'{_SECOND}.')}" if name.startswith(f"{_SECOND}.") else name


def components(adapter: Adapter) -> set[str]:
    """Parts of a pipeline that the names of an image adapter begin with; empty of any other, or without such a part."""
    notes = adapter.notes.get(NOTES)
    if (
        not isinstance(notes, Mapping)
        or _COMPONENT in notes
        or (adapter.stored_names and adapter.format != "diffusers")
    ):
        return set()
    prefixes = {name.partition(".")[0] for name in (*adapter.updates, *adapter.replacements)}
    return prefixes if prefixes <= set(PIPELINE_PARTS) else set()


def with_component(adapter: Adapter, config: Mapping[str, object], base: Base | None = None) -> Adapter:
    """The adapter of a PEFT folder, with the part's name before its own where the model is one of diffusers.

    Its config names the class of the model; where it does not, a base that a person has given does.
    """
    mapping = config.get("auto_mapping")
    kind = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    of_class = [family for family in denoisers() if kind in family.classes] if kind is not None else []
    if kind is None and (base_family := family_of_base(base)) is not None and _has_modules(base_family, adapter):
        of_class = [base_family]
    components = {family.component for family in of_class}
    if len(components) != 1:
        return adapter
    (part,) = components
    family = of_class[0].name if len(of_class) == 1 else None
    metadata = adapter.notes.get("peft")
    texts = metadata.get("metadata") if isinstance(metadata, Mapping) else None
    return replace(
        adapter,
        updates={f"{part}.{name}": update for name, update in adapter.updates.items()},
        replacements={f"{part}.{name}": r for name, r in adapter.replacements.items()},
        notes={**adapter.notes, NOTES: {"metadata": texts or {}, "family": family, "source": "peft"}},
    )


def _has_modules(family: Family, adapter: Adapter) -> bool:
    """Whether every name of the adapter is that of a module in diffusers' model of the family."""
    names = [*adapter.updates, *(name.rpartition(".")[0] for name in adapter.replacements)]
    places = (family.find(name) for name in names)
    return all(place is not None and place.targets == (name,) for name, place in zip(names, places, strict=True))
