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
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from loratools.adapter import Adapter
from loratools.errors import FormatError, UsageError
from loratools.naming.image.unet_blocks import block_of, weights_by_block
from loratools.ops.common.arguments import AdapterArgument, AdapterSource
from loratools.selection import match_glob
from loratools.sources.address import bare_repository, parse_address
from loratools.sources.cache import cached_repository
from loratools.sources.local import local_path
from loratools.storage.files import is_there

HeadsRule: TypeAlias = Literal["refuse", "first", "average"]
Calibration: TypeAlias = Literal["svc"]
HEADS = get_args(HeadsRule)
CALIBRATIONS = get_args(Calibration)


@dataclass(frozen=True)
class Ingredient:
    """An adapter of a recipe, and what its delta is multiplied with.

    Attributes:
        adapter: The adapter: a path relative to the folder of the recipe file.
        weight: What its delta is multiplied with.
        modules: For each glob, a further factor for the modules whose names match it; of several that match, the last
            one counts.
        blocks: Kohya's block weights, as further factors: 12, 17, 20 or 26 numbers.
    """

    adapter: AdapterSource
    weight: float = 1.0
    modules: Mapping[str, float] = field(default_factory=dict)
    blocks: tuple[float, ...] = ()

    def weights(self, adapter: Adapter) -> dict[str, float]:
        """Target -> weight, over the adapter's targets.

        Raises:
            UsageError: A glob that matches no target, or a target in no block.
        """
        targets = list(adapter.updates)
        every = [*targets, *(name for names in adapter.aliases.values() for name in names)]
        for glob in self.modules:
            if not match_glob(every, glob):
                raise UsageError(
                    f"'{glob}' matches none of the {len(targets)} modules of '{adapter.name}'",
                    hint=f"they look like '{targets[0]}'; a glob may start with '*'" if targets else None,
                )
        weights = {}
        for name in targets:
            target_names = (name, *adapter.aliases.get(name, ()))
            factors = [v for glob, v in self.modules.items() if match_glob(target_names, glob)]
            weights[name] = self.weight * (factors[-1] if factors else 1.0)
        if not self.blocks:
            return weights
        by_block = weights_by_block(self.blocks)
        blocks = {name: block_of(name) for name in targets}
        if lost := [name for name, block in blocks.items() if block is None]:
            raise UsageError(
                f"{len(lost)} modules of '{adapter.name}' are in no block that block weights are for",
                details=lost,
                hint="block weights are for U-Nets of Stable Diffusion; weigh modules by name with --module-weight",
            )
        return {name: weight * by_block[blocks[name] or ""] for name, weight in weights.items()}


@dataclass(frozen=True)
class Recipe:
    """All settings of a combination.

    Attributes:
        adapters: The adapters, in their order: each a path, or a mapping with the fields of an adapter. They may be
            given beside the recipe instead.
        method: The method, as `loratools methods` lists it.
        set: Options of the method by name.
        rank: Truncate each module to this rank. Without it and `energy`, ranks add up.
        energy: Truncate each module to this share of its squared Frobenius norm, in (0, 1].
        max_rank: With `energy`: the largest rank of any module.
        seed: Random seed of a method that draws numbers.
        dtype: The dtype of the stored factors; by default the widest dtype among the sources of each module.
        include: A glob, or a list of them, over module names; empty selects all.
        exclude: A glob, or a list of them, of names to leave out.
        heads: What to do with replaced weights that differ: `refuse`, `first` or `average`.
        calibrate: `svc`: rescale singular values that several adapters share.
        norm_match: Whether each module is scaled to the norm `sum of |weight| |delta|` over the adapters.
    """

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
        for value, option, choices in (
            (self.heads, "policy for replaced weights", HEADS),
            (self.calibrate, "calibration", (None, *CALIBRATIONS)),
        ):
            if value not in choices:
                choice_list = ", ".join(k for k in choices if k is not None)
                raise UsageError(f"no {option} named '{value}'; there are: {choice_list}")
        for ingredient in self.adapters:
            name = ingredient.adapter.name if isinstance(ingredient.adapter, Adapter) else ingredient.adapter
            numbers = {"": ingredient.weight, **{f" for '{g}'": w for g, w in ingredient.modules.items()}}
            numbers |= {f" for block {i + 1}": w for i, w in enumerate(ingredient.blocks)}
            for scope, weight in numbers.items():
                if not math.isfinite(weight):
                    raise UsageError(f"the weight of '{name}'{scope} is {weight}, which is not finite")

    def to_dict(self) -> dict[str, object]:
        """What is not a default, as a recipe file would say it; adapters by name."""
        document: dict[str, object] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name != "adapters" and value != each.default and value != {}:
                document[each.name] = list(value) if isinstance(value, tuple) else value
        document["adapters"] = [
            {
                "adapter": i.adapter.name if isinstance(i.adapter, Adapter) else _name_of(i.adapter),
                "weight": i.weight,
                **({"modules": dict(i.modules)} if i.modules else {}),
                **({"blocks": list(i.blocks)} if i.blocks else {}),
            }
            for i in self.adapters
        ]
        return document


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
    for glob, weights in module_weights.items():
        numbers = [float(weights)] * len(pairs) if isinstance(weights, (int, float)) else [float(x) for x in weights]
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
        UsageError: There is no such file.
        FormatError: It is no YAML, or not a recipe: fields that are not known, twice there, or of another type.
    """
    path = Path(path)
    document = _parsed(path)
    faults: list[str] = []
    fields = _checked(document, RECIPE_FIELDS, "", faults)
    adapters = []
    for i, entry in enumerate(fields.pop("adapters", [])):
        entry = {"adapter": entry} if isinstance(entry, str) else entry
        entry_name = f"adapters[{i}]"
        if not isinstance(entry, Mapping):
            faults.append(f"{entry_name} is no path and no mapping")
            continue
        entry_fields = _checked(entry, ADAPTER_FIELDS, f"{entry_name}.", faults)
        modules = entry_fields.get("modules", {})
        faults += [f"{entry_name}.modules: {g!r} is no number" for g, w in modules.items() if not _is_number(w)]
        blocks = entry_fields.get("blocks", [])
        faults += [f"{entry_name}.blocks: {w!r} is no number" for w in blocks if not _is_number(w)]
        if not entry_fields.get("adapter"):
            faults.append(f"{entry_name} has no adapter")
        elif not faults:
            numbers = {str(g): float(w) for g, w in modules.items()}
            source = _relative_to_recipe(path, str(entry_fields["adapter"]))
            adapters.append(
                Ingredient(source, float(entry_fields.get("weight", 1.0)), numbers, tuple(map(float, blocks)))
            )
    for name in ("include", "exclude"):
        globs = fields.get(name, [])
        globs = [globs] if isinstance(globs, str) else globs
        faults += [f"{name}: {g!r} is no glob" for g in globs if not isinstance(g, str)]
        fields[name] = tuple(globs)
    if faults:
        raise FormatError(f"'{path}' is not a recipe that can be followed", details=faults)
    return Recipe(adapters=tuple(adapters), **fields)


def overridden(recipe: Recipe, settings: Mapping[str, object]) -> Recipe:
    """The recipe with what is given besides it, which goes before what it says. `set` is merged."""
    named_settings = {k: v for k, v in settings.items() if v is not None and v is not False and v != () and v != {}}
    if recipe.adapters and named_settings.get("adapters"):
        raise UsageError("adapters are given, and the recipe names some as well", hint="give them in one place")
    if {"rank", "energy"} & named_settings.keys():
        recipe = replace(recipe, rank=None, energy=None)
    options = named_settings.pop("set", {})
    assert isinstance(options, Mapping)
    # Another method has other options.
    from_recipe = recipe.set if named_settings.get("method", recipe.method) == recipe.method else {}
    return replace(recipe, **named_settings, set={**from_recipe, **options})  # type: ignore[arg-type]


_Kind = type | tuple[type, ...]
RECIPE_FIELDS: dict[str, _Kind] = {
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
ADAPTER_FIELDS: dict[str, _Kind] = {"adapter": str, "weight": (int, float), "modules": dict, "blocks": list}


def _checked(
    entry: Mapping[object, object], field_kinds: Mapping[str, _Kind], prefix: str, faults: list[str]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in entry.items():
        if key not in field_kinds:
            near = difflib.get_close_matches(str(key), field_kinds, n=1)
            faults.append(
                f"{prefix}{key} is no field" + (f"; did you mean {near[0]}?" if near else _list_of_fields(field_kinds))
            )
        elif not isinstance(value, field_kinds[str(key)]) or (
            isinstance(value, bool) and field_kinds[str(key)] is not bool
        ):
            faults.append(f"{prefix}{key} is {value!r}, and no {kind_name(field_kinds[str(key)])}")
        else:
            values[str(key)] = value
    return values


def _list_of_fields(names: Iterable[str]) -> str:
    return f"; there are: {', '.join(names)}"


def kind_name(kind: _Kind) -> str:
    kind_names = {
        str: "text",
        list: "list",
        dict: "mapping",
        int: "whole number",
        float: "number",
        bool: "true or false",
    }
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return "number" if float in kinds else " or ".join(kind_names[k] for k in kinds)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _relative_to_recipe(recipe: Path, adapter: str) -> str:
    """What a recipe calls an adapter, as a path from here: it is beside the recipe, or on the hub."""
    place = recipe.parent / adapter
    if parse_address(adapter) is not None or (bare_repository(adapter) is not None and not is_there(place)):
        return adapter
    return str(place)


def _name_of(adapter: str | Path) -> str:
    """The name of the file or folder of an adapter; of one from the hub, its address with the commit."""
    cached = cached_repository(local_path(adapter))
    return cached.address if cached is not None and cached.commit is not None else Path(adapter).name


def _parsed(path: Path) -> Mapping[object, object]:
    import yaml  # type: ignore[import-untyped]

    class Strict(yaml.SafeLoader):  # type: ignore[misc]
        """Refuses a key that is there twice, of which YAML would silently take the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[object, object]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise FormatError(f"'{path}' has {key!r} twice{node.start_mark}")
            mapping: dict[object, object] = super().construct_mapping(node, deep=deep)
            return mapping

    if not path.is_file():
        raise UsageError(f"there is no recipe at '{path}'")
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=Strict)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FormatError(f"'{path}' is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, Mapping):
        raise FormatError(f"'{path}' is no recipe: a recipe is a mapping of fields")
    return document
