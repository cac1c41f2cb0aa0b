"""Image adapters as PEFT has them: of one part of a pipeline, whose modules stand without the part's name.

PEFT wraps one model and saves the names of its modules; its config says the class of that model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loratools.adapter import Adapter
from loratools.errors import MismatchError, UnsupportedError
from loratools.formats.common.base import Base
from loratools.formats.image_parts.from_base import IMAGE_FORMATS
from loratools.formats.image_parts.notes import NOTES
from loratools.formats.image_parts.reading import given_base
from loratools.formats.image_parts.writing import SINGLE_FILE
from loratools.naming.image.evidence import Sizes, denoisers, listed, shortened
from loratools.naming.image.family import Family
from loratools.naming.image.given_base import GivenBase, decide_for
from loratools.naming.image.pipeline import DENOISERS, PIPELINE_PARTS, SECOND
from loratools.storage.files import quoted

_COMPONENT = "component"


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


def ensure_component(adapter: Adapter, format: str) -> None:
    """Raise where a format of image models is asked for, and no name of the adapter says of which part of one it is.

    Raises:
        UnsupportedError: Its names are those of one model, as PEFT has them.
    """
    names = _sizes(adapter)
    if format not in IMAGE_FORMATS or any(n.partition(".")[0] in (*PIPELINE_PARTS, SINGLE_FILE) for n in names):
        return
    knowing = [family for family in denoisers() if _can_be_of(names, family)]
    if knowing:
        hint = f"name the model it is for: {' or '.join(f'--base {family.name}' for family in knowing)}"
    else:
        hint = "choose a format of language models with --to: peft, mlx or gguf"
    raise UnsupportedError(
        f"{quoted(adapter.name)} cannot be written as {format}: its names do not say which part of an image or video "
        "model they are of",
        details=shortened(list(names)),
        hint=hint,
    )


def second_as_first(adapter: Adapter) -> Adapter:
    """The adapter of a pipeline's second transformer alone, with the names that its file of one model has."""
    names = [*adapter.updates, *adapter.replacements]
    parts = {name.partition(".")[0] for name in names}
    if adapter.stored_names or not parts or {*DENOISERS} & parts != {SECOND}:
        return adapter
    return replace(
        adapter,
        updates={_first(name): update for name, update in adapter.updates.items()},
        replacements={_first(name): replacement for name, replacement in adapter.replacements.items()},
    )


def _first(name: str) -> str:
    return f"transformer.{name.removeprefix(f'{SECOND}.')}" if name.startswith(f"{SECOND}.") else name


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

    Raises:
        MismatchError: The given base is of another family than the class, or than the names.
    """
    mapping = config.get("auto_mapping")
    kind = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    of_class = [family for family in denoisers() if kind in family.classes] if kind is not None else []
    named_base = given_base(base)
    if named_base is not None and (of_class or kind is None):
        if of_class and named_base.family not in of_class:
            raise MismatchError(
                f"the adapter is of {listed(of_class, 'or')}, by the class in its config ({kind}), and the given base "
                f"is of {named_base.family.name}",
                hint="give the model that the adapter was trained on",
            )
        of_class = [named_base.family] if _is_of_base(adapter, named_base) else of_class
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


def _is_of_base(adapter: Adapter, named_base: GivenBase) -> bool:
    """Whether every name of the adapter is that of a module in diffusers' model of the base's family.

    Raises:
        MismatchError: Another family has these names, or its model has modules of these sizes.
    """
    names = _sizes(adapter)
    # Text encoders and other parts have names that no table of families has; they are of any base.
    if not any(all(map(family.find, names)) for family in denoisers()):
        return False
    places = decide_for(named_base, names, denoisers()).places
    return all(place.targets == (name,) for name, place in places.items())


def _sizes(adapter: Adapter) -> dict[str, tuple[int | None, int | None]]:
    """Outputs and inputs of each module; None of those that are no matrices, and of replaced weights."""
    shapes = {name: update.shape for name, update in adapter.updates.items()}
    names = {name: (shape[0], shape[1]) if len(shape) > 1 else (None, None) for name, shape in shapes.items()}
    return names | dict.fromkeys((name.rpartition(".")[0] for name in adapter.replacements), (None, None))


def _can_be_of(names: Sizes, family: Family) -> bool:
    """Whether a base of this family would be accepted for these names."""
    if not all(map(family.find, names)):
        return False
    try:
        decide_for(GivenBase(family), names, denoisers())
    except MismatchError:
        return False
    return True
