"""What the names of one file mean: looked up in the tables of all families; only an answer without a rival counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from loratools.errors import UndecidedError, UnsupportedError
from loratools.naming.image import dit, flux, sd3, stable_diffusion, text_encoders, video
from loratools.naming.image.families import Family, Place
from loratools.storage.files import quoted

# (outputs, inputs) of a module; None where the file does not tell.
Sizes = Mapping[str, tuple[int | None, int | None]]
# What names of base models have in them, the more particular first.
_WORDS = (
    ("refiner", "sdxl-refiner"), ("sdxl", "sdxl"), ("stable-diffusion-xl", "sdxl"), ("sd3", "sd3"),
    ("diffusion-3", "sd3"),
    ("flux.2", "flux2"), ("flux2", "flux2"), ("flux-2", "flux2"), ("flux", "flux"), ("hunyuan", "hunyuan-video"),
    ("sd_v", "sd"), ("stable-diffusion-v", "sd"), ("z-image", "z-image"), ("zimage", "z-image"), ("lumina", "lumina2"),
    ("wan2", "wan"), ("wan-", "wan"), ("qwen", "qwen-image"),
)  # fmt: skip
# How deep below a checkpoint's top a model may hang.
_DEEPEST = 4
_HINT = "name the model it is for: --base BASE"


@dataclass(frozen=True)
class Resolved:
    """`families`: those that know every name, and in which the names mean the same."""

    families: tuple[Family, ...]
    places: Mapping[str, Place]


@cache
def denoisers() -> tuple[Family, ...]:
    """UNets and transformers."""
    modules = (stable_diffusion, flux, sd3, video, dit)
    return tuple(family for module in modules for family in module.families())


def encoders() -> tuple[Family, ...]:
    return text_encoders.families()


def family_named(name: str) -> Family | None:
    return next((family for family in denoisers() if family.name == name), None)


def resolve(names: Sizes, families: Iterable[Family], *, flat: bool = False, model: str | None = None) -> Resolved:
    """The meaning of every name.

    model: what the file says of the model it is for; of several families that know all names it may choose one.

    Raises:
        UnsupportedError: no family knows them all.
        UndecidedError: several do, with different meanings.
    """
    families = tuple(families)
    found = {family: {name: family.find(name, flat=flat) for name in names} for family in families}
    whole = [family for family, places in found.items() if all(places.values())]
    if not whole:
        raise _unknown(names, found)
    fitting = hinted(model, narrowed(names, whole, flat=flat))
    meanings = [{name: place for name, place in found[family].items() if place is not None} for family in fitting]
    if any(other != meanings[0] for other in meanings[1:]):
        differing = [n for n in names if any(other[n] != meanings[0][n] for other in meanings)]
        raise UndecidedError(
            f"{len(differing)} of {len(names)} names have different meanings in {_listed(fitting)}",
            details=[quoted(name) for name in differing[:5]],
            hint=_HINT,
        )
    return Resolved(tuple(fitting), meanings[0])


def unflattened(names: Iterable[str], weights: Iterable[str]) -> dict[str, str] | None:
    """The modules of a given base that `names` are with underscores for their dots; None where it has not all of them.

    The base may have all of them below one prefix, such as `model.diffusion_model.`, which is left out.

    Raises:
        UndecidedError: two of its modules are the same without dots, or two prefixes have them all.
    """
    names = list(names)
    modules = {weight.rpartition(".")[0] for weight in weights}
    by_prefix: dict[str, dict[str, set[str]]] = {}
    for module in modules:
        parts = module.split(".")
        for depth in range(min(len(parts), _DEEPEST)):
            inner = ".".join(parts[depth:])
            by_prefix.setdefault(".".join(parts[:depth]), {}).setdefault(inner.replace(".", "_"), set()).add(inner)
    found = [
        {name: sorted(flat[name]) for name in names}
        for flat in by_prefix.values()
        if all(name in flat for name in names)
    ]
    if not found:
        return None
    torn = [name for name in names if len(found[0][name]) > 1 or any(other[name] != found[0][name] for other in found)]
    if torn:
        raise UndecidedError(
            f"{len(torn)} of {len(names)} names could be several modules of the base",
            details=[f"{quoted(name)}: {' or '.join(found[0][name])}" for name in torn[:5]],
        )
    return {name: dotted[0] for name, dotted in found[0].items()}


def narrowed(names: Sizes, families: list[Family], *, flat: bool = False) -> list[Family]:
    """Of several families that know all names, those that the shapes do not speak against; all, where all would go."""
    for against in (_other_shapes, _other_depth):
        if len(families) > 1:
            families = [family for family in families if not against(names, family, flat)] or families
    return families


def _other_shapes(names: Sizes, family: Family, flat: bool) -> bool:
    for name, (rows, columns) in names.items():
        if rows is None or columns is None:
            continue
        # A third of a step is more than any rounding, and less than what tells two families apart.
        ratio = family.ratio(name, flat=flat)
        if ratio is not None and not 0.9 < rows / columns / ratio < 1.1:
            return True
        attends = name.replace("_", ".").endswith(("attn2.to.k", "attn2.to.v"))
        if attends and family.widths and columns not in family.widths:
            return True
    return False


def _other_depth(names: Sizes, family: Family, flat: bool) -> bool:
    """Whether the numbers of its blocks end elsewhere than in any model of the family: most adapters go to the end."""
    last: dict[str, int] = {}
    for name in names:
        place = family.find(name, flat=flat)
        block, _, rest = (place.targets[0] if place is not None else "").partition(".")
        number = rest.partition(".")[0]
        if number.isdecimal():
            last[block] = max(last.get(block, 0), int(number) + 1)
    return any(last[block] not in depths for block, depths in family.depths.items() if block in last)


def hinted(text: str | None, families: list[Family]) -> list[Family]:
    """Those that a name of a base model speaks of; all, where it speaks of none."""
    words = (text or "").lower()
    exact = [family for family in families if family.name == words]
    if exact:
        return exact
    said = next((name for word, name in _WORDS if word in words), None)
    return [family for family in families if family.name == said] or families


def _unknown(names: Sizes, found: Mapping[Family, Mapping[str, Place | None]]) -> UnsupportedError:
    best = max(found, key=lambda family: sum(place is not None for place in found[family].values()))
    missing = [name for name, place in found[best].items() if place is None]
    if len(missing) == len(names):
        message = f"none of its {len(names)} module names is known in any model here"
    else:
        message = f"{len(missing)} of its {len(names)} module names are not known in {best.name}, nor all in any other"
    more = [f"… and {len(missing) - 5} more"] if len(missing) > 5 else []
    return UnsupportedError(message, details=[quoted(n) for n in missing[:5]] + more, hint=_HINT)


def _listed(families: Iterable[Family]) -> str:
    return " and ".join(family.name for family in families)
