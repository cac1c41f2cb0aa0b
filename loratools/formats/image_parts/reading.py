"""Reading of image formats, from what their keys are found to name: modules become updates under canonical names.

Canonical are the names of diffusers and transformers, after the part of the pipeline: `unet.`, `transformer.`,
`text_encoder.`, `text_encoder_2.`, …. A fused module becomes several updates. What cannot be cut keeps its own name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from loratools.adapter import Adapter, Replacement
from loratools.errors import (
    FormatError,
    LoraToolsError,
    MismatchError,
    UndecidedError,
    UnreadTensorsError,
    UnsupportedError,
)
from loratools.formats.common.base import Base
from loratools.formats.common.header_keys import FAMILY
from loratools.formats.common.source import AdapterSource, counted, shown
from loratools.formats.image_parts.fused import apart
from loratools.formats.image_parts.kinds import NotReadError, Scale, updates_of
from loratools.formats.image_parts.notes import NOTES
from loratools.formats.image_parts.spellings import Module, grouped, is_learnt_token
from loratools.hints import DAMAGED_ADAPTER
from loratools.naming.image.evidence import Sizes, decide, denoisers, families_in, family_named, listed
from loratools.naming.image.family import Family, Place
from loratools.naming.image.given_base import GivenBase, decide_for
from loratools.naming.image.pipeline import DENOISERS, SECOND, TEXT_ENCODERS
from loratools.naming.image.resolving import base_family, denoiser_modules, names_prefix, unflattened
from loratools.naming.image.text_encoders import meanings
from loratools.storage.files import quoted
from loratools.storage.stored import scalars
from loratools.updates.parts.protocol import Update

_EMBEDDING = "an embedding of a new word (textual inversion), which is no part of a LoRA"
# What the part that removes the noise is called before the family is known.
DENOISER = "denoiser"


@dataclass(frozen=True)
class Located:
    """Where a module's name points: `part` of the pipeline, and the name in it.

    flat    underscores stand for the dots
    place   what it means, where the format itself knows; else it is looked up
    """

    part: str
    name: str
    flat: bool = False
    place: Place | None = None


@dataclass(frozen=True)
class Read:
    """What a format tells this file: how to find modules, and which part of the pipeline a text encoder is.

    known_only   whether text encoders that no table has are refused
    """

    format: str
    locate: Callable[[str], Located | None]
    encoder: Callable[[str, Family | None], str] = lambda part, family: part
    scale: Callable[[str], Scale] | None = None
    table_names_only: bool = False
    families: tuple[Family, ...] = field(default_factory=denoisers)


def read(source: AdapterSource, file_layout: Read) -> Adapter:
    """The adapter.

    Raises:
        FormatError: Parts that do not fit together.
        UnsupportedError: Keys, kinds or names that are not read, all of them named.
        UndecidedError: Names with several meanings.
    """
    modules, unparsed, twice = grouped(source.tensors)
    located = {name: file_layout.locate(name) for name in modules}
    strange = unparsed + [key for name, at in located.items() if at is None for key in modules[name].keys.values()]
    if strange:
        raise UnreadTensorsError(
            f"{counted(len(strange), 'tensor')} of {quoted(source.file)} not read as {file_layout.format}",
            sorted(strange),
            details=shown(
                [f"{quoted(key)}{', ' + _EMBEDDING if is_learnt_token(key) else ''}" for key in sorted(strange)]
            ),
            hint="leave the embeddings out with --exclude GLOB; programs load them from a file of their own"
            if all(is_learnt_token(key) for key in strange)
            else "leave them out with --exclude GLOB, or give --from FORMAT, if it is another",
        )
    if twice:
        raise FormatError(
            f"{quoted(source.file)} has {counted(len(twice), 'part')} twice, in two spellings",
            details=shown([quoted(key) for key in sorted(twice)]),
        )
    declared_family = source.metadata.get(FAMILY)
    model = source.metadata.get("ss_base_model_version") or source.metadata.get("modelspec.architecture")
    architecture = source.metadata.get("modelspec.architecture", "")
    header = declared_family or f"{model or ''} {architecture}".strip() or None
    keeps_names = source.stored_names
    families: tuple[Family, ...] = ()
    undecided: LoraToolsError | None = None
    aliases: dict[str, tuple[str, ...]] = {}
    try:
        places, families = _places(
            modules, {n: at for n, at in located.items() if at is not None}, file_layout, header, source.base
        )
    except (UnsupportedError, UndecidedError) as error:
        if source.base is not None:
            raise  # the base was given to tell them, so that there is nobody else to ask
        places, undecided, keeps_names = _names_of_file(modules), error, True
    if source.stored_names:
        aliases = {
            modules[name].stored_name: tuple(f"{prefixed.prefix}{t}" for t in prefixed.place.targets)
            for name, prefixed in places.items()
        }
        places = _names_of_file(modules)
    updates, replacements, warnings = _updates(source, modules, places, file_layout)
    if source.other:
        entries = ", ".join(shown([quoted(name) for name in source.other]))
        warnings.append(f"{counted(len(source.other), 'entry', 'entries')} besides the tensors not read: {entries}")
    if (contradiction := _contradicts(header, source.base, families)) is not None:
        warnings.append(contradiction)
    if undecided is not None:
        warnings.append(f"modules keep the names that the file has for them: {undecided.message}")
    names = [family.name for family in families]
    notes = {
        "metadata": dict(source.metadata),
        "family": names[0] if len(names) == 1 else None,
        "source": file_layout.format,
    }
    return Adapter(
        updates=updates,
        replacements=replacements,
        format=file_layout.format,
        path=source.path,
        base_model=model or None,
        notes={NOTES: notes},
        warnings=tuple(warnings),
        stored_names=keeps_names,
        undecided=undecided,
        aliases=aliases,
    )


def _contradicts(header: str | None, base: Base | None, families: tuple[Family, ...]) -> str | None:
    """A warning that the header names another family than the base, or than the modules' names.

    The base and the names take precedence.
    """
    named_base, header_families = given_base(base), families_in(header, denoisers())
    if named_base is not None:
        families = (named_base.family,)
    if not families or not header_families or any(family in header_families for family in families):
        return None
    text = f"its header names {listed(header_families, 'or')} ({quoted(str(header))}), and"
    names = listed(families, "or")
    if named_base is not None:
        return f"{text} the given base is of {names}: it is read as an adapter of the base"
    return f"{text} its modules are those of {names}, as which it is read"


def _names_of_file(modules: Mapping[str, Module]) -> dict[str, PrefixedPlace]:
    """The places of modules that keep the names that the file has for them."""
    return {name: PrefixedPlace("", Place(m.stored_name, (m.stored_name,))) for name, m in modules.items()}


@dataclass(frozen=True)
class PrefixedPlace:
    """A module's place below `prefix`."""

    prefix: str
    place: Place


def _places(
    modules: Mapping[str, Module],
    located: Mapping[str, Located],
    file_layout: Read,
    header: str | None,
    base: Base | None,
) -> tuple[dict[str, PrefixedPlace], tuple[Family, ...]]:
    groups: dict[tuple[str, bool], dict[str, Located]] = {}
    for name, at in located.items():
        if at.place is None:
            groups.setdefault((at.part, at.flat), {})[name] = at
    place_of = {name: PrefixedPlace("transformer.", at.place) for name, at in located.items() if at.place is not None}
    named_base = given_base(base)
    if place_of and named_base is not None:
        # The format knows what only one family has; the base may still be of another family.
        inputs = {t: (None, modules[name].sizes[1]) for name, at in place_of.items() for t in at.place.targets}
        decide_for(named_base, inputs, file_layout.families)
    families: tuple[Family, ...] = file_layout.families if len(file_layout.families) == 1 else ()
    count = len({part for part, _ in groups if part in TEXT_ENCODERS})
    candidates = tuple(f for f in file_layout.families if f.text_encoders is None or f.text_encoders >= count)
    if any(part == SECOND for part, _ in groups):
        candidates = tuple(family for family in candidates if family.second)
    for (part, flat), members in groups.items():
        if part == DENOISER or part in DENOISERS:
            sizes = {at.name: modules[name].sizes for name, at in members.items()}
            by_component = tuple(f for f in candidates if part == DENOISER or f.component == part.removesuffix("_2"))
            places, families, prefix = _denoiser(sizes, by_component, header, base, flat=flat)
            prefix = f"{part}." if part != DENOISER else prefix
            place_of |= {name: PrefixedPlace(prefix, places[at.name]) for name, at in members.items()}
    family = families[0] if len(families) == 1 else None
    for (part, flat), members in groups.items():
        if part != DENOISER and part not in DENOISERS:
            inner = [at.name for at in members.values()]
            look_up = flat or file_layout.table_names_only
            places = meanings(inner, flat=flat) if look_up else {name: Place(name, (name,)) for name in inner}
            prefix = f"{file_layout.encoder(part, family)}."
            place_of |= {name: PrefixedPlace(prefix, places[at.name]) for name, at in members.items()}
    return place_of, families


def _denoiser(
    names: Sizes, families: tuple[Family, ...], header: str | None, base: Base | None, *, flat: bool
) -> tuple[Mapping[str, Place], tuple[Family, ...], str]:
    """What the names mean, the families in which they do, and what stands before the canonical names."""
    named_base = given_base(base)
    if named_base is not None:
        decision = decide_for(named_base, names, families, flat=flat, header=header)
        return decision.places, decision.families, f"{decision.families[0].component}."
    if base is None:
        decision = decide(names, families, flat=flat, header=header)
        return decision.places, decision.families, f"{decision.families[0].component}."
    # A base that no table has: its names are those that there are, and it says itself how it is stored.
    try:
        decision = decide(names, families, flat=flat, header=header)
    except (UnsupportedError, UndecidedError):
        dotted = unflattened(names, base.shapes) if flat else {name: name for name in names}
        if dotted is None:
            raise
        return {name: Place(inner, (inner,)) for name, inner in dotted.items()}, (), names_prefix(base.config)
    if base.model_type is not None:
        raise MismatchError(
            f"the adapter is of {listed(decision.families, 'or')}, and the given base is a {base.model_type}",
            hint="give the model that the adapter was trained on",
        )
    return decision.places, decision.families, f"{decision.families[0].component}."


def given_base(base: Base | None) -> GivenBase | None:
    """The family of the model that a person has named, with its modules; None if none that is known here is named.

    Args:
        base: What is known of the model: its names and shapes, its config, or the name of its family.
    """
    if base is None:
        return None
    if base.family is not None:
        family = family_named(base.family)
        return None if family is None else GivenBase(family)
    family = base_family(base.shapes, base.config)
    return None if family is None else GivenBase(family, denoiser_modules(base.shapes))


def _updates(
    source: AdapterSource, modules: Mapping[str, Module], places: Mapping[str, PrefixedPlace], file_layout: Read
) -> tuple[dict[str, Update], dict[str, Replacement], list[str]]:
    updates: dict[str, Update] = {}
    replacements: dict[str, Replacement] = {}
    unread: dict[str, list[str]] = {}
    faults: list[str] = []
    uncut, zero = 0, []
    alphas = _alphas(modules)
    for name in sorted(modules):
        module = modules[name]
        prefixed = places[name]
        if module.kinds == {"replacement"}:
            target = f"{prefixed.prefix}{prefixed.place.targets[0]}.weight"
            if len(prefixed.place.targets) > 1 or len(module.parts) > 1:
                unread.setdefault("a weight of a fused module that is replaced", []).append(name)
            else:
                replacements[target] = Replacement(module.parts["weight"], "unlisted")
            continue
        try:
            scale = _scale(module, name, file_layout, alphas)
            module_updates = updates_of(module, scale)
        except NotReadError as error:
            if error.unsupported:
                unread.setdefault(str(error), []).append(name)
            else:
                faults.append(str(error))
            continue
        if scale.alpha == 0 and any(update.alpha for update in module_updates.values()):
            zero.append(name)
        for leaf, update in module_updates.items():
            pieces = apart(update, prefixed.place, columns=module.sizes[1])
            if pieces is None:
                uncut += 1
                pieces = {prefixed.place.name: update}
            for target, piece in pieces.items():
                full = f"{prefixed.prefix}{target}{leaf}"
                if full in updates:
                    faults.append(f"{quoted(full)} is named twice")
                updates[full] = piece
    if faults:
        raise FormatError(
            f"{quoted(source.file)} has {counted(len(faults), 'fault')} in its tensors",
            details=shown(faults),
            hint=DAMAGED_ADAPTER,
        )
    if unread:
        raise UnreadTensorsError(
            f"{quoted(source.path)} has {counted(len(unread), 'part')} that are not supported here",
            [key for names in unread.values() for name in names for key in modules[name].keys.values()],
            details=[
                f"{kind}: {quoted(names[0])}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
                for kind, names in sorted(unread.items())
            ],
            hint="leave them out with --exclude GLOB",
        )
    warnings = []
    if zero:
        warnings.append(
            f"{counted(len(zero), 'module')} with an alpha of 0, which trainers take for the rank: "
            f"{', '.join(shown([quoted(name) for name in zero]))}"
        )
    if uncut:
        warnings.append(
            f"{counted(uncut, 'fused module')} of a kind that cannot be cut exactly, each read as one module by its "
            "authors' name"
        )
    return updates, replacements, warnings


def _alphas(modules: Mapping[str, Module]) -> dict[str, float]:
    """The values of the alphas that are one number, by the name of the module."""
    stored = {
        name: alpha
        for name, m in modules.items()
        if (alpha := m.parts.get("alpha")) is not None and alpha.elements == 1
    }
    return dict(zip(stored, scalars(stored.values()), strict=True))


def _scale(module: Module, name: str, file_layout: Read, alphas: Mapping[str, float]) -> Scale:
    alpha = module.parts.get("alpha")
    if alpha is not None:
        if alpha.elements != 1:
            raise NotReadError(f"{quoted(module.keys['alpha'])} has {alpha.elements} values; one is needed")
        return Scale(alphas[name], "tensor")
    return file_layout.scale(name) if file_layout.scale is not None else Scale(None, "assumed")
