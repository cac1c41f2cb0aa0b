"""What of a fine-tune is in no adapter, and how much of the change that is."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.ops.extract.outcomes import NotExtracted, Outcome
from loratools.ops.finetune.delta import norm
from loratools.ops.finetune.pairs import Pair, Pairs, Unpaired
from loratools.skipped import Skipped
from loratools.tensors.dtypes import FLOAT_DTYPES


def skipped_tensors(pairs: Pairs, results: Mapping[Pair, Outcome], total_change: float) -> list[Skipped]:
    """What changed and was not extracted, by name.

    Args:
        pairs: All tensors of both checkpoints.
        results: What became of each pair.
        total_change: The squared norm of all that changed.
    """
    in_both = [
        Skipped(pair.name, outcome.why, norm=outcome.norm, share=_share(outcome.norm, total_change))
        for pair, outcome in results.items()
        if isinstance(outcome, NotExtracted)
    ]
    in_one = [
        Skipped(tensor.name, tensor.why, norm=_norm_of(tensor)) for tensor in pairs.unpaired if tensor.declared is None
    ]
    return sorted([*in_both, *in_one], key=lambda skipped: skipped.name)


def _share(size: float | None, total_change: float) -> float | None:
    return size**2 / total_change if size is not None else None


def _norm_of(unpaired: Unpaired) -> float | None:
    return norm(unpaired.name, unpaired.tensor) if unpaired.tensor.dtype in FLOAT_DTYPES else None
