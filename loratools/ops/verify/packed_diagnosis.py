"""Why a weight on the grid of a quantisation scheme is not base plus deltas: hypotheses, each held against its values.

On a coarse grid a best-fit weight says little, since rounding to nearest loses most of a small update. A hypothesis is
therefore told where every value is the nearest one of the grid to the sum that it names, and not by the fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from loratools.ops.merge.outputs import Output
from loratools.ops.verify.cause import Cause
from loratools.ops.verify.diagnosis import MAGNITUDE_DROPPED, TRANSPOSED, candidate_weights, flipped, plain_lora
from loratools.ops.verify.fit import Fit
from loratools.ops.verify.packed import PackedMeasure, grid_name, measure_packed
from loratools.quantization.common.protocol import PackedWeight

_UNRELATED = 0.1


def packed_cause(
    output: Output,
    weight: PackedWeight,
    measured: PackedMeasure,
    names: Sequence[str],
    *,
    kept_scales: bool,
    sample: float = 1.0,
) -> Cause:
    """Tell why a packed weight is not explained.

    Args:
        output: What the weight should be.
        weight: The packed weight of the merged model.
        measured: What was measured of it.
        names: The names of the adapters that change it, in order.
        kept_scales: Whether scales and zero points are those of the base, so that what lies beside the sum is no matter
            of how they were chosen.
        sample: The share of the rows to look at.
    """
    fit = measured.fit
    if fit.moved == 0:
        return Cause("not-applied", "the weights are those of the base: no adapter was applied")
    for times, cause in candidate_weights(output, names):
        if _explained(output, weight, sample, times):
            return cause
    if (plain := plain_lora(output)) is not None and _explained(plain, weight, sample):
        return MAGNITUDE_DROPPED
    if (transposed_output := flipped(output)) is not None and _explained(transposed_output, weight, sample):
        return TRANSPOSED
    if measured.neighbouring:
        message = (
            f"every value is one of the two of {grid_name(weight)} that its sum lies between ({_shown(fit)}), but how "
            "it was chosen cannot be computed again from what is here"
        )
        return Cause("rounded-otherwise", message, undecided=True)
    if not kept_scales:
        message = (
            f"the merged model is quantised ({grid_name(weight)}) with scales of its own, and its values are not the "
            f"nearest ones to the sums ({_shown(fit)})"
        )
        return Cause("quantised", message, undecided=True)
    cosine = sum(fit.along) / math.sqrt(fit.moved * fit.energy) if fit.energy > 0 else 0.0
    if abs(cosine) < _UNRELATED:
        return Cause("other-change", "the weights were changed by other things than these adapters (cosine below 0.1)")
    return Cause("unexplained-change", "the change holds these adapters and something else, or a part of them")


def unknown_grid(fit: Fit, weight: PackedWeight) -> Cause:
    """What can be decided about a weight whose scheme is read and not written: that it equals the base's,
    or nothing.
    """
    if fit.moved == 0:
        return Cause("not-applied", "the weights are those of the base: no adapter was applied")
    message = f"the merged weights are quantised ({grid_name(weight)}), so no recipe can be identified ({_shown(fit)})"
    return Cause("quantised", message, undecided=True)


def _shown(fit: Fit) -> str:
    return "best-fit weight " + ", ".join("none" if w is None else f"{w:.3g}" for w in fit.weights())


def _explained(output: Output, weight: PackedWeight, sample: float, times: Sequence[float] | None = None) -> bool:
    measured = measure_packed(output, weight, sample=sample, times=times)
    return measured is not None and measured.nearest
