"""Two checkpoints under one set of names: the base's, with what either of them ties, and experts as in memory.

One prefix for all (`model.`, `bert.`) is seen through where it is the only one that explains the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratools.checkpoints import Checkpoint
from loratools.errors import MismatchError
from loratools.naming.renaming import best_renamings
from loratools.ops.finetune.in_memory import Tensors, of_transformers_5, targets_of, with_fused_experts
from loratools.ops.finetune.layer_kinds import kind_of
from loratools.tensors.lazy import LazyTensor


@dataclass(frozen=True)
class Sides:
    """The tensors of both checkpoints by the base's names.

    Attributes:
        base: Those of the base.
        tuned: Those of the fine-tuned model.
        targets: For every name of either, its module as an adapter names it.
        warnings: How names were read.
    """

    base: Tensors
    tuned: Tensors
    targets: Mapping[str, str]
    warnings: tuple[str, ...]

    @property
    def in_both(self) -> list[str]:
        """Names of tensors that both have, sorted."""
        return sorted(self.base.keys() & self.tuned.keys())


def sides_of(base: Checkpoint, tuned: Checkpoint, *, as_files: bool) -> Sides:
    """Bring the tensors of both under the base's names.

    Args:
        base: The model before fine-tuning.
        tuned: The fine-tuned model.
        as_files: By the names, and with the experts, that the files have, and not those of the library that wrote them.

    Raises:
        MismatchError: The names have nothing in common, or fit in more than one way.
    """
    before, after = _with_tied(base, tuned), _with_tied(tuned, base)
    after, warnings = _renamed(before, after, base, tuned)
    in_memory = not as_files and of_transformers_5(base, tuned)
    if in_memory:
        before, after = with_fused_experts(base.config, before, after)
    targets = targets_of(base, {**after, **before}, in_memory=in_memory)
    return Sides(before, after, targets, tuple(warnings))


def _with_tied(one: Checkpoint, other: Checkpoint) -> Tensors:
    """The weights of `one`, with those that it ties and the other stores: a head may have come loose in training."""
    tied = {name: one.weights[source] for name, source in one.tied.items() if name in other.weights}
    return {**tied, **one.weights}


def _renamed(
    base_tensors: Mapping[str, LazyTensor], tuned_tensors: Mapping[str, LazyTensor], base: Checkpoint, tuned: Checkpoint
) -> tuple[Tensors, list[str]]:
    """The fine-tuned tensors by the base's names."""
    layers = {
        n: t.shape for n, t in tuned_tensors.items() if kind_of(n, t) in ("linear", "conv", "experts", "embedding")
    }
    winners, best = best_renamings(layers, {n: t.shape for n, t in base_tensors.items()}, tuple.__eq__)
    if best == 0:
        raise MismatchError(
            f"no weight of a layer of '{tuned.name}' has the name and shape of one of '{base.name}'",
            details=[f"base: {n}" for n in sorted(base_tensors)[:3]]
            + [f"fine-tuned: {n}" for n in sorted(tuned_tensors)[:3]],
            hint="one must be the fine-tune of the other",
        )
    if not winners[0]:
        return dict(tuned_tensors), []
    if len(winners) > 1:
        raise MismatchError(
            f"the names of '{tuned.name}' fit those of '{base.name}' in {len(winners)} ways",
            details=[f"with {winner}: {best} weights" for winner in winners],
            hint="rename the tensors of one of them",
        )
    # A head outside of the prefix keeps its name.
    renamed = {
        (new if (new := winners[0](name)) in base_tensors else name): tensor for name, tensor in tuned_tensors.items()
    }
    return renamed, [f"the names of the fine-tuned model are read with {winners[0]}"]
