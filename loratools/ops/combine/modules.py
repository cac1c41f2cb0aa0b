"""The modules of a combination: for each, the updates of the adapters that have it, with their weights.

A glob need not match in every adapter, and an adapter need not have every module. Experts that one parameter holds are
modules of their own here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loratools.adapter import Adapter
from loratools.errors import MismatchError, UsageError
from loratools.ops.combine.recipe import Recipe
from loratools.ops.combine.settings import ModuleSettings
from loratools.ops.lowrank.experts import Experts, apart, ensure_alike
from loratools.ops.lowrank.factors import layout_of, require_factors
from loratools.selection import select_names
from loratools.tensors.shapes import without_unit_kernel
from loratools.updates.parts.protocol import Update, flow


@dataclass(frozen=True)
class WeightedUpdate:
    """What one adapter does to a module: the adapter at position `index` of the arguments, from 0."""

    index: int
    weight: float
    update: Update
    adapter_name: str


@dataclass(frozen=True)
class CombinedModules:
    """The union of the adapters' modules, sorted by name.

    Attributes:
        updates: For each module, the updates whose weight is not 0, at least one.
        fused_experts: Parameters that hold several experts, which `updates` has one by one.
        without_weight: Names of modules that every adapter gives the weight 0.
    """

    updates: Mapping[str, Sequence[WeightedUpdate]]
    fused_experts: Mapping[str, Experts]
    without_weight: Sequence[str]


def selected_names(
    sources: Sequence[tuple[Adapter, float]], include: Sequence[str], exclude: Sequence[str]
) -> set[str]:
    """Names of modules and replaced weights that the globs leave, of all adapters together."""
    names = sorted({name for adapter, _ in sources for name in (*adapter.updates, *adapter.replacements)})
    aliases = {name: further_names for adapter, _ in sources for name, further_names in adapter.aliases.items()}
    unread = [key for adapter, _ in sources for key in adapter.unread_tensors]
    return set(select_names(names, include, exclude, aliases=aliases, unread=unread))


def combined_modules(
    sources: Sequence[tuple[Adapter, float]],
    recipe: Recipe,
    settings: ModuleSettings,
    *,
    selected: set[str],
    participants: Sequence[int],
) -> CombinedModules:
    """Collect the updates of the adapters at these positions by module.

    Raises:
        UsageError: A weight that the method or the recipe's globs do not allow.
        UnsupportedError: Updates without factors, all of them named.
        MismatchError: Adapters that differ in the shape of a module.
    """
    updates: dict[str, list[WeightedUpdate]] = {}
    fused_experts: dict[str, Experts] = {}
    for index in participants:
        adapter, _ = sources[index]
        weights = recipe.adapters[index].weights(adapter)
        for name, update in adapter.updates.items():
            if name not in selected:
                continue
            modules, experts = apart({name: update})
            if experts:
                ensure_alike(name, fused_experts.setdefault(name, experts[name]), experts[name])
            for module, module_update in modules.items():
                of_module = updates.setdefault(module, [])
                if weights[name]:
                    of_module.append(WeightedUpdate(index, weights[name], module_update, adapter.name))
    weighted = {name: of_module for name, of_module in sorted(updates.items()) if of_module}
    require_factors((f"{name} of '{u.adapter_name}'", u.update) for name, us in weighted.items() for u in us)
    _require_same_shapes(weighted)
    _require_allowed_weights(weighted, settings)
    return CombinedModules(weighted, fused_experts, sorted(name for name, us in updates.items() if not us))


def _require_same_shapes(updates: Mapping[str, Sequence[WeightedUpdate]]) -> None:
    misfits = [
        f"{name}   " + ", ".join(f"'{u.adapter_name}' {flow(u.update.shape)}" for u in of_module)
        for name, of_module in updates.items()
        if len({(without_unit_kernel(u.update.shape), layout_of(u.update).embedding) for u in of_module}) > 1
    ]
    if misfits:
        raise MismatchError(
            f"the adapters differ in the shape of {len(misfits)} of {len(updates)} modules",
            details=misfits,
            hint="they were trained on different models; leave such modules out with --exclude",
        )


def _require_allowed_weights(updates: Mapping[str, Sequence[WeightedUpdate]], settings: ModuleSettings) -> None:
    negative = sorted({u.adapter_name for of_module in updates.values() for u in of_module if u.weight < 0})
    if negative and not settings.method.LAWS.negative_weights:
        raise UsageError(
            f"the method '{settings.method_name}' takes no negative weights, as that of '{negative[0]}'",
            hint="linear and most others do",
        )
