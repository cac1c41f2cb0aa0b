"""What an adapter does to one weight: one file per kind, and the protocol they share.

Every update is its **delta against the unmodified base**, so that the deltas of several adapters add, in any order.
Nothing here imports torch until values are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from loratools.tensors import LazyTensor

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors
    from loratools.algebra.rounding import Floats


class Update(Protocol):
    """One kind's tensors and numbers for one weight; a frozen value."""

    @property
    def kind(self) -> str:
        """The name of its file in `updates/`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it updates, (out, in, ...), as the layer computes with it."""

    @property
    def rank(self) -> int: ...

    @property
    def alpha(self) -> float: ...

    @property
    def alpha_source(self) -> str:
        """Where alpha comes from: config, tensor, metadata or assumed."""

    @property
    def scale(self) -> float:
        """What multiplies the product of the factors."""

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        """Its tensors, by the name that the kind's own file gives them."""

    def factors(self) -> Factors | None:
        """`b: (out, rank)`, `a: (rank, in)` with the scale in `b`, in float64; None where the delta is not low rank."""

    def prepare(self, *, transposed: bool, weight: float, dtype: str) -> Delta:
        """Read what is needed to give rows of `weight * delta`; of its transpose for a base stored as (in, out).

        dtype: F32 or F64, what is computed in.
        """


class Delta(Protocol):
    """A weighted delta that gives its rows as numpy arrays, in the orientation in which the base stores the weight.

    numpy and not torch, which takes longer to import than a model of a billion weights takes to merge.
    """

    @property
    def terms(self) -> int:
        """Products summed in one entry: the `r` of the error bound."""

    def rows(self, start: int, stop: int, *, out: Floats | None = None) -> Floats:
        """Rows start:stop, (stop - start, columns), in the dtype that it was prepared in; into `out` if it is given."""

    def energy(self, start: int, stop: int) -> float:
        """Sum of the squares of these rows."""

    def magnitude(self, start: int, stop: int) -> Floats:
        """Upper bound of the absolute values that rounding errors of these rows are proportional to: sum |b| |a|."""
