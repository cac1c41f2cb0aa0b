"""What a person must know beside the figures of an extraction, and why there is nothing to extract."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from loratools.checkpoints import Checkpoint
from loratools.errors import InputError
from loratools.ops.extract.outcomes import Factored, Outcome, ReplacedTensor
from loratools.ops.extract.report import ExtractReport
from loratools.ops.extract.settings import Settings
from loratools.ops.finetune.delta import Rounding
from loratools.ops.finetune.pairs import Pair
from loratools.skipped import Skipped

# From this share of unchanged weights on, rounding has taken away much of the update.
_MOSTLY_IDENTICAL = 0.5
# An adapter that captures less of the change is no good stand-in for it.
_LITTLE_ENERGY = 0.5
# ... unless it was not given the rank.
_FAIR_RANK = 16
# Errors of quantisation below this share of the norm of the change do not matter to it.
_SMALL_ERROR = 0.05


def quality_warnings(report: ExtractReport, factors: Mapping[Pair, Factored], settings: Settings) -> list[str]:
    """What speaks against taking the adapter for the fine-tune."""
    warnings = []
    narrow = [e.rounding for p, e in factors.items() if p.tuned.dtype in ("BF16", "F16")]
    elements, identical = sum(r.elements for r in narrow), sum(r.identical for r in narrow)
    if elements and identical > _MOSTLY_IDENTICAL * elements:
        warnings.append(
            f"{identical / elements:.0%} of the weights of changed modules are bit for bit the base's: the update is "
            "smaller than the rounding of the fine-tuned checkpoint, which stored it attenuated and in part only"
        )
    warnings += quantisation_warnings([e.rounding for e in factors.values()], report.quantization_error)
    ranks = max(((m.rank or 0) for m in report.modules), default=0)
    if report.energy is not None and report.energy < _LITTLE_ENERGY and ranks >= _FAIR_RANK:
        changed = sum(e.rounding.elements - e.rounding.identical for e in factors.values())
        tuned_bytes = sum(p.tuned.nbytes for p in factors)
        width = sum(p.tuned.nbytes for p in factors) / max(1, sum(e.rounding.elements for e in factors.values()))
        warnings.append(
            f"the adapter holds {report.energy:.1%} of the change, at ranks up to {ranks}: it is spread over nearly "
            "all directions, as reinforcement learning and noise leave it, and is not of low rank. The whole "
            f"difference takes {tuned_bytes / 1e6:,.0f} MB, and the {changed:,} weights that changed with their places "
            f"{changed * (width + 4) / 1e6:,.0f} MB: take modules whole with --whole"
        )
    policy = settings.policy
    allowed_error = policy.limit.error if policy.limit.error is not None else None
    if policy.limit.energy is not None:
        allowed_error = math.sqrt(max(0.0, 1 - policy.limit.energy))
    if allowed_error is not None:
        # Above what float32 sums can tell.
        short = [m for m in report.modules if (m.error or 0.0) > allowed_error + 1e-6]
        if short:
            reason = "limits on size" if policy.limits_all or policy.limit.max_rank else f"storing as {settings.dtype}"
            warnings.append(f"{len(short)} modules keep less than asked for, for {reason}: {short[0].name} and others")
    return warnings


def quantisation_warnings(roundings: Sequence[Rounding], share: float | None) -> list[str]:
    """That the change is partly the error of quantisation, or does not hold it.

    Args:
        roundings: What was measured beside each change.
        share: The norm of all errors of quantisation as a share of the norm of all changes; None if there are none.
    """
    if share is None or share < _SMALL_ERROR:
        return []
    if any(rounding.quantisation and rounding.noise >= rounding.quantisation for rounding in roundings):
        return [
            f"quantisation alone changes these weights by {share:.0%} of the norm of the change. If the fine-tune "
            "started from the model in full precision, the change holds that error, which is of full rank: give both "
            "models in full precision, or leave most of the error out with --noise-edge"
        ]
    return [
        f"quantisation alone changes these weights by {share:.1f} times the norm of the change: the fine-tuned model "
        "started from the dequantised weights, and the change holds nothing of that error"
    ]


def tied_embedding_warnings(results: Mapping[Pair, Outcome], settings: Settings) -> list[str]:
    """That an embedding is taken whole although factors were asked for."""
    tied = [pair.name for pair, outcome in results.items() if pair.followed and outcome.norm]
    if settings.embeddings != "lora" or not tied:
        return []
    return [f"'{tied[0]}' is taken whole: a tied head follows it, and PEFT would add factors to one of the two only"]


def resized(results: Mapping[Pair, Outcome]) -> list[str]:
    """A warning about what PEFT needs to be configured with before it can load the adapter."""
    sizes = sorted(
        {(p.base.shape[0], p.tuned.shape[0]) for p, r in results.items() if p.grown and isinstance(r, ReplacedTensor)}
    )
    return [
        f"the vocabulary goes from {old} to {new} tokens: before PEFT loads the adapter, "
        f"base.resize_token_embeddings({new}); loratools merge does it by itself"
        for old, new in sizes
    ]


def unwritable_lines(lost: Mapping[str, str], format: str) -> list[str]:
    """What the format cannot hold, one line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for name, why in sorted(lost.items()):
        by_reason.setdefault(why, []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} cannot be written as {format}, should it "
        f"have changed: {why}; leave such modules out with --exclude"
        for why, names in by_reason.items()
    ]


def nothing_error(base: Checkpoint, tuned: Checkpoint, skipped: Sequence[Skipped]) -> InputError:
    """Nothing changed, or nothing that an adapter can hold."""
    changed = [f"{s.name}   {s.why}" for s in skipped if s.share is not None]
    if not changed:
        return InputError(
            f"'{tuned.name}' has the weights of '{base.name}': nothing changed, so there is nothing to extract",
            hint="give the base first and the fine-tuned model second; has it been saved after training?",
        )
    return InputError(
        f"nothing of '{tuned.name}' that an adapter can hold and that was to be extracted differs from '{base.name}'",
        details=changed,
        hint="choose other modules with --include and --exclude",
    )
