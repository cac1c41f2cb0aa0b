"""Values that stand out among others, by medians, so that they do not hide themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

# Of fewer values it cannot be said what is usual.
_FEWEST = 8
# Deviations of the logarithm, in units of the usual one. The usual one is taken to be at least a fifth: modules of
# different layers and roles differ by that even where all were made alike.
_FARTHEST = 12.0
_LEAST_DEVIATION = 0.2
# Of a normal distribution, the standard deviation over the median absolute one.
_NORMAL = 1.4826


def far_above(sizes: Mapping[str, float]) -> dict[str, float]:
    """The names of values far above all others, each with how many times the median it is.

    sizes: positive numbers. Their logarithms are compared, as sizes of updates spread by factors and not by sums.
    """
    if len(sizes) < _FEWEST:
        return {}
    logarithms = {name: math.log(size) for name, size in sizes.items()}
    middle = median(logarithms.values())
    deviation = _NORMAL * median(abs(value - middle) for value in logarithms.values())
    limit = middle + _FARTHEST * max(deviation, _LEAST_DEVIATION)
    return {name: math.exp(value - middle) for name, value in logarithms.items() if value > limit}
