"""Names by a given base: which family it is of, and which of its modules a name without dots means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

from loratools.errors import LoraToolsError, UndecidedError
from loratools.naming.image.evidence import Sizes, decide, denoisers
from loratools.naming.image.family import Family

# How deep below a checkpoint's top a model may hang.
_DEEPEST = 4
# Where single files and pipelines keep what removes the noise; nothing at all where they hold nothing else.
DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "net.", "transformer.", "unet.", "")


def base_family(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, object]) -> Family | None:
    """The one family that a base model is of; None if it is of none that is known here, or may be of several.

    Takes the same arguments as `base_families`.
    """
    families = base_families(shapes, config)
    return families[0] if len(families) == 1 else None


def base_families(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, object]) -> tuple[Family, ...]:
    """The family of a base model, or several in which all its names mean the same; none that is known, if empty.

    Args:
        shapes: Of its weights, by name; empty if only its config is known.
        config: Its config.json, or those of a pipeline's components by their names.
    """
    modules = denoiser_modules(shapes)
    parts = [config, *(part for part in (config.get("transformer"), config.get("unet")) if isinstance(part, Mapping))]
    classes = [str(part["_class_name"]) for part in parts if "_class_name" in part]
    named = [family for family in denoisers() if set(classes) & set(family.classes)]
    if len(named) == 1:
        return (named[0],)
    # Of a UNet the class says little: its config, or its weights, tell which.
    if named and not modules:
        named = [family for family in named if any(_fits(family, part) for part in parts)]
        return tuple(named) if len(named) == 1 else ()
    candidates = [family for family in named or denoisers() if any(family.find(name) for name in modules)]
    best = [family for family in candidates if all(family.find(name) for name in modules)]
    if not best:
        # A checkpoint also has modules that no adapter trains and no table has; most of its modules are known.
        counts = {family: sum(family.find(name) is not None for name in modules) for family in candidates}
        most = max(counts.values(), default=0)
        best = [family for family, count in counts.items() if count == most and 2 * count > len(modules)]
    if not best:
        return ()
    names = {name: sizes for name, sizes in modules.items() if all(family.find(name) for family in best)}
    try:
        return decide(names, best).families
    except LoraToolsError:
        return ()


def names_prefix(config: Mapping[str, object]) -> str:
    """What stands before the names of adapters for a base that no table has: `transformer.` or `unet.` where the base
    is diffusers' own, by its config, and `diffusion_model.`, as ComfyUI has it, where it is a single file."""
    for part in ("transformer", "unet"):
        if isinstance(config.get(part), Mapping):
            return f"{part}."
    kind = str(config.get("_class_name", ""))
    if not kind:
        return "diffusion_model."
    return "unet." if kind.startswith("UNet") else "transformer."


def denoiser_modules(shapes: Mapping[str, tuple[int, ...]]) -> Sizes:
    """Modules of the part of a base that removes the noise, with the (outputs, inputs) of each."""
    for prefix in DENOISER_PREFIXES:
        inside = {n[len(prefix) :]: shape for n, shape in shapes.items() if n.startswith(prefix)}
        modules = {
            name.removesuffix(".weight"): (shape[0], shape[1] if len(shape) > 1 else None)
            for name, shape in inside.items()
            if name.endswith(".weight") and shape
        }
        if modules and (prefix or any(name.partition(".")[0] in _first_parts() for name in modules)):
            return modules
    return {}


def unflattened(names: Iterable[str], weights: Iterable[str]) -> dict[str, str] | None:
    """The modules of a given base that `names` are with underscores for their dots; None if it has not all of them.

    The base may have all of them below one prefix, such as `model.diffusion_model.`, which is left out.

    Raises:
        UndecidedError: Two of its modules are the same without dots, or two prefixes have them all.
    """
    names = list(names)
    modules = {weight.rpartition(".")[0] for weight in weights}
    by_prefix: dict[str, dict[str, set[str]]] = {}
    for module in modules:
        parts = module.split(".")
        for depth in range(min(len(parts), _DEEPEST)):
            inner = ".".join(parts[depth:])
            by_prefix.setdefault(".".join(parts[:depth]), {}).setdefault(inner.replace(".", "_"), set()).add(inner)
    readings = [
        {name: sorted(flat[name]) for name in names}
        for flat in by_prefix.values()
        if all(name in flat for name in names)
    ]
    if not readings:
        return None
    torn = [
        name
        for name in names
        if len(readings[0][name]) > 1 or any(reading[name] != readings[0][name] for reading in readings)
    ]
    if torn:
        raise UndecidedError(
            f"{len(torn)} of {len(names)} names could be several modules of the base",
            details=[f"{name!r}: {' or '.join(readings[0][name])}" for name in torn[:5]],
        )
    return {name: dotted[0] for name, dotted in readings[0].items()}


def _fits(family: Family, config: Mapping[str, object]) -> bool:
    """Whether the width of the text in a config of a UNet is one of the family."""
    width = config.get("cross_attention_dim")
    return isinstance(width, int) and any(width in sizes for sizes in family.widths.values())


@cache
def _first_parts() -> frozenset[str]:
    """First parts of all names that any family has."""
    return frozenset(
        name.partition(".")[0]
        for family in denoisers()
        for rules in family.rules.values()
        for rule in rules
        for name in (rule.original, *rule.diffusers)
    )
