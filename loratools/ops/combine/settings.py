"""What a recipe asks of every module alike, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from loratools import methods, registry
from loratools.methods import Method, Value
from loratools.ops.combine.recipe import Recipe
from loratools.ops.lowrank.limit import Limit
from loratools.storage.casting import stored_dtype


@dataclass(frozen=True)
class ModuleSettings:
    """Settings shared by all modules of a combination.

    Attributes:
        method: The method, and by `method_name` its name.
        options: Every option of the method.
        limit: How far each module is truncated.
        seed: Random seed of the method.
        dtype: The dtype of the stored factors; each module keeps the widest of its sources if None.
        calibrate: The calibration that follows the method, if any.
        norm_match: Whether each module is scaled to the weighted norms of its adapters.
        keep_kinds: Whether a module that comes back unchanged keeps a kind other than LoRA.
    """

    method: Method
    method_name: str
    options: Mapping[str, Value]
    limit: Limit
    seed: int
    dtype: str | None
    calibrate: str | None
    norm_match: bool
    keep_kinds: bool

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> ModuleSettings:
        """Return the settings of a recipe.

        Raises:
            UsageError: A method, an option of it, a limit or a dtype that does not exist or does not apply.
        """
        limit = Limit(rank=recipe.rank, energy=recipe.energy, max_rank=recipe.max_rank)
        only = recipe.adapters[0] if len(recipe.adapters) == 1 else None
        return cls(
            method=cast(Method, registry.load("methods", recipe.method)),
            method_name=recipe.method,
            options=methods.settings(recipe.method, recipe.set),
            limit=limit,
            seed=recipe.seed,
            dtype=stored_dtype(recipe.dtype) if recipe.dtype is not None else None,
            calibrate=recipe.calibrate,
            norm_match=recipe.norm_match,
            # Formats hold adapters of one kind: only an adapter that comes back whole keeps another than LoRA.
            keep_kinds=only is not None and only.weight == 1 and not (only.modules or only.blocks or limit.is_given),
        )
