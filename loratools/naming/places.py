"""Where something lies in a base that stores it under another name, in another order, or as a part of a larger tensor.

A weight is thought of as a matrix (out, in), or as one for each expert. A place says which rectangle of it lies in
which rectangle of a stored tensor, and how it lies there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.naming.heads import interleaving, ungrouped
from loratools.tensors.views import Span

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Part:
    """A rectangle: of the matrix of one expert, where the tensor has three axes; all of it by default."""

    expert: int | None = None
    rows: Span | None = None
    columns: Span | None = None

    def transposed(self) -> Part:
        """The same rectangle of the transposed matrix."""
        return Part(self.expert, self.columns, self.rows)

    def __str__(self) -> str:
        axes = [str(self.expert)] if self.expert is not None else []
        if self.rows is not None or self.columns is not None:
            axes += [_shown(self.rows), _shown(self.columns)]
        return f"[{', '.join(axes)}]" if axes else ""


@dataclass(frozen=True)
class HeadOrder:
    """Rows of attention heads that are interleaved: see `naming.heads`."""

    heads: int

    def __call__(self, rows: int) -> NDArray[np.intp]:
        """For every row as stored, the number of the row in the order of transformers."""
        import numpy as np

        return np.array(interleaving(rows, self.heads), np.intp)

    def fits(self, rows: int) -> bool:
        """Whether this number of rows can be these heads."""
        return self.heads > 0 and rows % (2 * self.heads) == 0


@dataclass(frozen=True)
class GroupedHeads:
    """Rows of queries, keys and values one after the other, which transformers has group by group."""

    queries: int
    keys: int

    def __call__(self, rows: int) -> NDArray[np.intp]:
        """For every row as stored, the number of the row in the order of transformers."""
        import numpy as np

        return np.array(ungrouped(rows, self.queries, self.keys), np.intp)

    def fits(self, rows: int) -> bool:
        """Whether this number of rows can be these heads."""
        return self.queries % self.keys == 0 and rows % (self.queries + 2 * self.keys) == 0


@dataclass(frozen=True)
class Place:
    """A part of a tensor of the base, which is (a part of) some weight.

    `of` some weight lies `at` a part of the base's tensor `weight`.

    transposed  stored as (in, out); `at` refers to the tensor as stored, `of` to the weight as (out, in). order
    of the rows of the weight, where they are stored in another.
    """

    weight: str
    transposed: bool = False
    at: Part = Part()
    of: Part = Part()
    order: HeadOrder | GroupedHeads | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is a whole tensor of the base, with nothing but its orientation to mind."""
        return self.at == Part() and self.of == Part() and self.order is None

    def __str__(self) -> str:
        return f"{self.weight}{self.at}"


@dataclass(frozen=True)
class Alias:
    """A weight under a name that is not stored: its shape, and the places that it is made of."""

    shape: tuple[int, ...]
    places: tuple[Place, ...]


def _shown(span: Span | None) -> str:
    if span is None:
        return ":"
    return f"{span.start}:{span.stop}" + (f":{span.step}" if span.step != 1 else "")
