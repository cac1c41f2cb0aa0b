"""Average linkage clustering, from the similarity of every pair.

The two groups with the largest mean similarity are joined, repeatedly (Sokal and Michener, 1958).
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def linked(similarities: Sequence[Sequence[float | None]], threshold: float) -> tuple[tuple[int, ...], ...]:
    """Return clusters, ordered so that similar items are next to each other.

    Args:
        similarities: A symmetric matrix, (items, items). None for a pair that cannot be compared counts as -1.
        threshold: Groups with at least this mean similarity are joined.

    Returns:
        Clusters of positions. Their concatenation orders all items by similarity, also beyond the threshold.

    Example:
        >>> linked([[1, 0.1, 0.9], [0.1, 1, 0.2], [0.9, 0.2, 1]], 0.5)
        ((0, 2), (1,))
    """
    groups: list[list[int]] = [[i] for i in range(len(similarities))]
    means = [[-1.0 if value is None else float(value) for value in row] for row in similarities]
    ends: list[list[list[int]]] = [[group] for group in groups]
    while len(groups) > 1:
        best, i, j = max((means[i][j], -i, -j) for i in range(len(groups)) for j in range(i + 1, len(groups)))
        kept_index, absorbed = -i, -j
        first, second = len(groups[kept_index]), len(groups[absorbed])
        # The mean over all pairs of a merged group with each of the others.
        merged = [
            (first * a + second * b) / (first + second) for a, b in zip(means[kept_index], means[absorbed], strict=True)
        ]
        ends[kept_index] = (
            [[*groups[kept_index], *groups[absorbed]]] if best >= threshold else [*ends[kept_index], *ends[absorbed]]
        )
        groups[kept_index] = [*groups[kept_index], *groups[absorbed]]
        means[kept_index] = merged
        for k, row in enumerate(means):
            row[kept_index] = merged[k]
        means[kept_index][kept_index] = math.inf
        del groups[absorbed], ends[absorbed], means[absorbed]
        for row in means:
            del row[absorbed]
    return tuple(tuple(group) for group in (ends[0] if ends else []))
