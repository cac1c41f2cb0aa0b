"""Recipe: all that says how adapters are combined, from the command line, from Python, or from a YAML file.

    method: ties
    set: {density: 0.3, space: core}
    rank: 16
    adapters:
      - adapter: ../style
        weight: 0.7
        modules: {"*.q_proj": 0.5}
      - adapter: ../facts

A file is read strictly: a field that is not known, or is there twice, is an error. The recipe that was used goes into
the metadata of what it made.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from loratools.adapter import Adapter
from loratools.errors import FormatError, UsageError
from loratools.naming.image.unet_blocks import block_of, weights_by_block
from loratools.ops.common.arguments import AdapterArgument, AdapterSource

HeadsRule: TypeAlias = Literal["refuse", "first", "average"]
Calibration: TypeAlias = Literal["svc"]
HEADS = get_args(HeadsRule)
CALIBRATIONS = get_args(Calibration)


@dataclass(frozen=True)
class Ingredient:
    """An adapter and what its delta is multiplied with.

    modules: glob -> a further factor for the modules that match; of several that match the last one counts.
    blocks: kohya's block weights, as further factors.
    """

    adapter: AdapterSource
    weight: float = 1.0
    modules: Mapping[str, float] = field(default_factory=dict)
    blocks: tuple[float, ...] = ()

    def weights(self, adapter: Adapter) -> dict[str, float]:
        """Target -> weight, over the adapter's targets.

        Raises:
            UsageError: a glob that matches no target, or a target in no block.
        """
        targets = list(adapter.updates)
        every = [*targets, *(name for names in adapter.aliases.values() for name in names)]
        for glob in self.modules:
            if not fnmatch.filter(every, glob):
                raise UsageError(
                    f"'{glob}' matches none of the {len(targets)} modules of '{adapter.name}'",
                    hint=f"they look like '{targets[0]}'; a glob may start with '*'" if targets else None,
                )
        found = {}
        for name in targets:
            known = (name, *adapter.aliases.get(name, ()))
            factors = [v for glob, v in self.modules.items() if any(fnmatch.fnmatchcase(n, glob) for n in known)]
            found[name] = self.weight * (factors[-1] if factors else 1.0)
        if not self.blocks:
            return found
        by_block = weights_by_block(self.blocks)
        blocks = {name: block_of(name) for name in targets}
        if lost := [name for name, block in blocks.items() if block is None]:
            raise UsageError(
                f"{len(lost)} modules of '{adapter.name}' are in no block that block weights are for",
                details=lost,
                hint="block weights are for U-Nets of Stable Diffusion; weigh modules by name with --module-weight",
            )
        return {name: weight * by_block[blocks[name] or ""] for name, weight in found.items()}


@dataclass(frozen=True)
class Recipe:
    """How to combine; see `ops.combine.combine` for what each field means."""

    adapters: tuple[Ingredient, ...] = ()
    method: str = "linear"
    set: Mapping[str, object] = field(default_factory=dict)
    rank: int | None = None
    energy: float | None = None
    max_rank: int | None = None
    seed: int = 0
    dtype: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    heads: str = "refuse"
    calibrate: str | None = None
    norm_match: bool = False

    def __post_init__(self) -> None:
        for value, word, known in (
            (self.heads, "policy for replaced weights", HEADS),
            (self.calibrate, "calibration", (None, *CALIBRATIONS)),
        ):
            if value not in known:
                there = ", ".join(k for k in known if k is not None)
                raise UsageError(f"no {word} named '{value}'; there are: {there}")
        for one in self.adapters:
            name = one.adapter.name if isinstance(one.adapter, Adapter) else one.adapter
            numbers = {"": one.weight, **{f" for '{g}'": w for g, w in one.modules.items()}}
            numbers |= {f" for block {i + 1}": w for i, w in enumerate(one.blocks)}
            for what, weight in numbers.items():
                if not math.isfinite(weight):
                    raise UsageError(f"the weight of '{name}'{what} is {weight}, which is not finite")

    def to_dict(self) -> dict[str, object]:
        """What is not a default, as a recipe file would say it; adapters by name."""
        found: dict[str, object] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name != "adapters" and value != each.default and value != {}:
                found[each.name] = list(value) if isinstance(value, tuple) else value
        found["adapters"] = [
            {
                "adapter": i.adapter.name if isinstance(i.adapter, Adapter) else Path(i.adapter).name,
                "weight": i.weight,
                **({"modules": dict(i.modules)} if i.modules else {}),
                **({"blocks": list(i.blocks)} if i.blocks else {}),
            }
            for i in self.adapters
        ]
        return found


def ingredients(
    arguments: Sequence[AdapterArgument] | AdapterSource,
    module_weights: Mapping[str, float | Sequence[float]],
    block_weights: Sequence[Sequence[float]],
) -> tuple[Ingredient, ...]:
    """Adapters as they are given to a function or a command.

    module_weights: glob -> a factor for all adapters, or one for each.
    block_weights: a list for each adapter, or one for all.
    """
    if isinstance(arguments, (str, Path, Adapter)):
        arguments = [arguments]
    pairs = [a if isinstance(a, tuple) else (a, 1.0) for a in arguments]
    each: list[dict[str, float]] = [{} for _ in pairs]
    for glob, given in module_weights.items():
        numbers = [float(given)] * len(pairs) if isinstance(given, (int, float)) else [float(x) for x in given]
        if len(numbers) == 1:
            numbers *= len(pairs)
        if len(numbers) != len(pairs):
            raise UsageError(f"'{glob}' has {len(numbers)} weights for {len(pairs)} adapters")
        for modules, number in zip(each, numbers, strict=True):
            modules[glob] = number
    if len(block_weights) not in (0, 1, len(pairs)):
        raise UsageError(f"{len(block_weights)} lists of block weights for {len(pairs)} adapters")
    blocks = [tuple(map(float, b)) for b in block_weights] or [()]
    blocks = blocks * len(pairs) if len(blocks) == 1 else blocks
    return tuple(Ingredient(a, float(w), m, b) for (a, w), m, b in zip(pairs, each, blocks, strict=True))


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe file. Paths in it are relative to its folder.

    Raises:
        UsageError: there is no such file.
        FormatError: it is no YAML, or not a recipe: fields that are not known, twice there, or of another type.
    """
    path = Path(path)
    document = _parsed(path)
    faults: list[str] = []
    given = _checked(document, _FIELDS, "", faults)
    adapters = []
    for i, entry in enumerate(given.pop("adapters", [])):
        entry = {"adapter": entry} if isinstance(entry, str) else entry
        where = f"adapters[{i}]"
        if not isinstance(entry, Mapping):
            faults.append(f"{where} is no path and no mapping")
            continue
        one = _checked(entry, _ADAPTER_FIELDS, f"{where}.", faults)
        modules = one.get("modules", {})
        faults += [f"{where}.modules: {g!r} is no number" for g, w in modules.items() if not _is_number(w)]
        blocks = one.get("blocks", [])
        faults += [f"{where}.blocks: {w!r} is no number" for w in blocks if not _is_number(w)]
        if not one.get("adapter"):
            faults.append(f"{where} has no adapter")
        elif not faults:
            numbers = {str(g): float(w) for g, w in modules.items()}
            source = str(path.parent / one["adapter"])
            adapters.append(Ingredient(source, float(one.get("weight", 1.0)), numbers, tuple(map(float, blocks))))
    for name in ("include", "exclude"):
        globs = given.get(name, [])
        globs = [globs] if isinstance(globs, str) else globs
        faults += [f"{name}: {g!r} is no glob" for g in globs if not isinstance(g, str)]
        given[name] = tuple(globs)
    if faults:
        raise FormatError(f"'{path}' is not a recipe that can be followed", details=faults)
    return Recipe(adapters=tuple(adapters), **given)


def overridden(recipe: Recipe, given: Mapping[str, object]) -> Recipe:
    """The recipe with what is given besides it, which goes before what it says. `set` is merged."""
    there = {k: v for k, v in given.items() if v is not None and v is not False and v != () and v != {}}
    if recipe.adapters and there.get("adapters"):
        raise UsageError("adapters are given, and the recipe names some as well", hint="give them in one place")
    if {"rank", "energy"} & there.keys():
        recipe = replace(recipe, rank=None, energy=None)
    options = there.pop("set", {})
    assert isinstance(options, Mapping)
    # Another method has other options.
    kept = recipe.set if there.get("method", recipe.method) == recipe.method else {}
    return replace(recipe, **there, set={**kept, **options})  # type: ignore[arg-type]


_Kind = type | tuple[type, ...]
_FIELDS: dict[str, _Kind] = {
    "adapters": list,
    "method": str,
    "set": dict,
    "rank": int,
    "energy": (int, float),
    "max_rank": int,
    "seed": int,
    "dtype": str,
    "include": (str, list),
    "exclude": (str, list),
    "heads": str,
    "calibrate": str,
    "norm_match": bool,
}
_ADAPTER_FIELDS: dict[str, _Kind] = {"adapter": str, "weight": (int, float), "modules": dict, "blocks": list}


def _checked(
    entry: Mapping[object, object], known: Mapping[str, _Kind], where: str, faults: list[str]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in entry.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            faults.append(f"{where}{key} is no field" + (f"; did you mean {near[0]}?" if near else _there(known)))
        elif not isinstance(value, known[str(key)]) or (isinstance(value, bool) and known[str(key)] is not bool):
            faults.append(f"{where}{key} is {value!r}, and no {_word(known[str(key)])}")
        else:
            found[str(key)] = value
    return found


def _there(known: Iterable[str]) -> str:
    return f"; there are: {', '.join(known)}"


def _word(kind: _Kind) -> str:
    words = {str: "text", list: "list", dict: "mapping", int: "whole number", float: "number", bool: "true or false"}
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return "number" if float in kinds else " or ".join(words[k] for k in kinds)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _parsed(path: Path) -> Mapping[object, object]:
    import yaml  # type: ignore[import-untyped]

    class Strict(yaml.SafeLoader):  # type: ignore[misc]
        """Refuses a key that is there twice, of which YAML would silently take the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[object, object]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise FormatError(f"'{path}' has {key!r} twice{node.start_mark}")
            found: dict[object, object] = super().construct_mapping(node, deep=deep)
            return found

    if not path.is_file():
        raise UsageError(f"there is no recipe at '{path}'")
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=Strict)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FormatError(f"'{path}' is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, Mapping):
        raise FormatError(f"'{path}' is no recipe: a recipe is a mapping of fields")
    return document
