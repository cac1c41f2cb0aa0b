"""A budget for the whole adapter, in bytes or parameters, as a limit for each of its modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.adapter import Adapter
from loratools.errors import UsageError
from loratools.execution.local import run, single_threaded_torch
from loratools.ops.lowrank.factors import exact_factors, is_vector
from loratools.ops.lowrank.finished import FinishedModules
from loratools.ops.lowrank.header_size import header_bytes
from loratools.ops.lowrank.limit import Limit
from loratools.ops.lowrank.reduce import update_dtype
from loratools.tensors.dtypes import DTYPE_BITS
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """How large all modules together may be: `amount` bytes of the file of weights, or that many parameters."""

    amount: int
    in_bytes: bool

    @property
    def unit(self) -> str:
        return "bytes" if self.in_bytes else "parameters"

    def size(self, tensor: LazyTensor) -> int:
        """What a tensor that is stored as it is takes."""
        return tensor.nbytes if self.in_bytes else tensor.elements

    def of_parameter(self, dtype: str) -> int:
        """What one parameter takes, stored in this dtype."""
        return DTYPE_BITS[dtype] // 8 if self.in_bytes else 1

    def for_factors(self, adapter: Adapter) -> int:
        """What is left for factors, at least: a file also holds names, metadata and replaced weights."""
        if not self.in_bytes:
            return self.amount
        header = header_bytes([*adapter.updates], [*adapter.replacements])
        metadata = sum(len(str(note)) for note in adapter.notes.values())
        replaced = sum(replacement.tensor.nbytes for replacement in adapter.replacements.values())
        return self.amount - header - metadata - replaced


def limits_within(
    budget: Budget,
    adapter: Adapter,
    *,
    dtype: str | None,
    max_rank: int | None,
    workers: int,
    finished: FinishedModules,
) -> dict[str, Limit]:
    """A limit for each module that is a matrix, so that the loss over all of them is least.

    Args:
        budget: How large all may be.
        adapter: The adapter, with experts as modules of their own.
        dtype: The dtype of the stored factors; if None, each module keeps its own.
        max_rank: No rank is above this.
        workers: Modules that are decomposed at once.
        finished: Where what is done is set aside, and where a killed run has done so.

    Raises:
        UsageError: The budget is too small for rank 1 in each.
    """
    from loratools.algebra.allocation import allocate, least_budget
    from loratools.algebra.lowrank import singular_values

    def spectrum_and_cost(item: tuple[str, Update]) -> tuple[Tensor, int]:
        name, update = item
        computed = finished.singular_values(name)
        if computed is None:
            factors = exact_factors(update, name, adapter.name)
            computed = singular_values(factors), factors.out_features + factors.in_features
            finished.keep_singular_values(name, *computed)
        spectrum, parameters_of_rank = computed
        return spectrum, parameters_of_rank * budget.of_parameter(dtype or update_dtype(update))

    matrices = [(name, update) for name, update in adapter.updates.items() if not is_vector(update)]
    with single_threaded_torch():
        pairs = run(matrices, spectrum_and_cost, threads=workers)
    spectra, costs = [spectrum for spectrum, _ in pairs], [cost for _, cost in pairs]
    vectors = [tensor for u in adapter.updates.values() if is_vector(u) for tensor in u.parts.values()]
    # A module of zeros is still stored with rank 1.
    zeros = sum(cost for spectrum, cost in pairs if not spectrum.any())
    room = budget.for_factors(adapter) - sum(map(budget.size, vectors)) - zeros
    least = least_budget(spectra, costs)
    if room < least:
        raise UsageError(
            f"{budget.amount:,} {budget.unit} are too few: rank 1 in each of {len(costs)} modules takes {least:,}, and "
            f"names, texts, vectors and weights that are stored whole {budget.amount - room:,}",
            hint="allow more, or leave modules out with --exclude",
        )
    ranks = allocate(spectra, costs, room, maximum=max_rank)
    return {name: Limit(rank=max(1, rank)) for (name, _), rank in zip(matrices, ranks, strict=True)}
