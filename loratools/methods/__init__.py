"""How several adapters become one: one file per method.

A method sees one target at a time: what each adapter says of it, as weighted factors. Reading, targets that only some
adapters have, ranks, storing and the report are `ops.combine`'s, so that a new method is one file with one function:

    "First line: what `loratools methods` prints. Then the formula, and the paper."

    def combine(factors): ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors


class Method(Protocol):
    """What a file of this folder provides."""

    def combine(self, factors: Sequence[tuple[float, Factors]], /) -> Factors:
        """Return the combination of `weight * delta` over the adapters that have this target, in their order.

        factors: at least one; float64, all of one shape, scales folded in, no weight zero.

        The result has the rank that the method gives it; `--rank` and `--energy` are applied afterwards. A method that
        leaves a delta alone returns the very object that it was given: that module then keeps its tensors' bytes.
        """
