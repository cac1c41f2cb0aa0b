"""What an adapter does to one weight: one file per kind, and the protocol they share.

Every update is its **delta against the unmodified base**, so that the deltas of several adapters add, in any order.
Nothing here imports torch until values are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

from loratools.tensors.lazy import LazyTensor
from loratools.tensors.shapes import shape_text

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors
    from loratools.algebra.rounding import Floats
    from loratools.updates.full import Full
    from loratools.updates.lora import LoRA
    from loratools.updates.lora_experts import LoRAExperts
    from loratools.updates.parts.deltas import Index

# Sizes of a weight as the layer computes with it: (out, in), (out, in, *kernel), (tokens, width) of an embedding,
# (experts, out, in), (n,) of a bias. None if the update's own tensors do not tell.
Shape: TypeAlias = tuple[int | None, ...]


class Update(Protocol):
    """One kind's tensors and numbers for one weight; a frozen value.

    `UpdateDefaults` answers what most kinds answer alike.
    """

    @property
    def kind(self) -> str:
        """The name of its file in `updates/`, with dashes."""

    @property
    def shape(self) -> Shape:
        """Shape of the weight that it updates, as the layer computes with it."""

    @property
    def rank(self) -> int | None:
        """None if the kind has nothing that is called so."""

    @property
    def alpha(self) -> float | None: ...

    @property
    def alpha_source(self) -> str:
        """Where alpha comes from: config, tensor, metadata or assumed."""

    @property
    def scale(self) -> float:
        """What multiplies the delta, or the part of it that has a scale; 1 where the kind has none."""

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        """Its tensors, by the name that the kind's own file gives them."""

    @property
    def needs_base(self) -> bool:
        """Whether the delta depends on the weight that it is added to."""

    @property
    def embedding(self) -> bool:
        """Whether it is of a weight (tokens, width), which is never stored transposed."""

    @property
    def optional(self) -> bool:
        """Whether a base need not have the weight: what scales biases does not tell which layers have one."""

    @property
    def whole_delta(self) -> bool:
        """Whether its delta is made all at once, so that making it by pieces would make all of it for each."""

    @property
    def assumes_alpha(self) -> bool:
        """Whether it is multiplied with an alpha that nothing stored says."""

    def with_alpha(self, alpha: float) -> Update:
        """The update with the alpha that a person gives, where it `assumes_alpha`; itself elsewhere."""

    @property
    def reads_layer_weight(self) -> bool:
        """Whether an update of a bias depends on the weight of the same layer (`with_layer_weight`)."""

    def with_layer_weight(self, weight: LazyTensor) -> Update:
        """The update with the unmodified weight of its layer, (out, in); itself where it does not depend on it."""

    def as_lora(self) -> LoRA | None:
        """Its tensors as a pair of factors, perhaps with a magnitude or a core; None if they are none."""

    def as_full(self) -> Full | None:
        """Its tensor as the difference of a whole weight; None if it stores something else."""

    def as_experts(self) -> LoRAExperts | None:
        """Its tensors as factors of all experts of one parameter; None if its weight has no experts of its own."""

    def cut_rows(self, start: int, stop: int) -> Update | None:
        """Its update of the outputs start:stop alone, of the same kind; None if the kind cannot be cut there."""

    def stack_rows(self, others: Sequence[Update]) -> Update | None:
        """One update whose outputs are its own and, below them, those of the others, which have the same inputs.

        None if updates of this kind cannot become one without a change of the delta.
        """

    def delta(self, *, base: LazyTensor | None = None) -> Floats:
        """Return the dense change of the weight, in its shape and in float32, computed in float64; scale included.

        Args:
            base: The unmodified weight; needed where `needs_base`.
        """

    def lycoris_parts(self) -> Mapping[str, LazyTensor] | None:
        """Its tensors with the numbers that LyCORIS has for the kind; None if these cannot say the same."""

    def lycoris_alpha(self) -> float | None:
        """What LyCORIS stores as alpha, which is no alpha of every kind; None if it stores none."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it can be an update of a weight of this shape (`fits_shape` does for most kinds)."""

    def factors(self) -> Factors | None:
        """Return the two factors of the delta; None if it is not of low rank.

        `b: (out, rank)`, `a: (rank, in x kernel)` with the scale in `b`, in float64, whose product is the delta.

        None if it is not low rank, where the tensors do not tell its shape, or where it depends on the base.
        """

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        """Read what is needed to give rows of `weight * delta`.

        base: the unmodified weight, in the orientation of `shape`; read only where `needs_base`.
        dtype: F32 or F64, what is computed in.
        """


class Delta(Protocol):
    """A weighted delta as a matrix that gives its rows as numpy arrays.

    numpy and not torch, which takes longer to import than a model of a billion weights takes to merge.
    """

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def terms(self) -> int:
        """Products summed in one entry: the `r` of the error bound."""

    def rows(self, start: int, stop: int, base: Floats | None = None, *, out: Floats | None = None) -> Floats:
        """Rows start:stop, (stop - start, columns), in the dtype that it was prepared in; into `out` if it is given.

        base: the same rows of the unmodified weight, in the same dtype, for kinds that need them.
        """

    def energy(self, start: int, stop: int) -> float | None:
        """Sum of the squares of these rows, where it is to be had without forming them."""

    def magnitude(self, start: int, stop: int, base: Floats | None = None) -> Floats:
        """Upper bound of the absolute values that rounding errors of these rows are proportional to: sum |b| |a|."""

    def input_directions(self) -> Floats | None:
        """Rows that span the inputs that its factors read, (k, columns); None if it has no such factors."""

    def transposed(self) -> Delta:
        """Its transpose."""

    def part(self, rows: Index, columns: Index) -> Delta:
        """Some of its rows and columns, in that order."""


def flow(shape: Shape) -> str:
    """Return a shape as people read a layer.

    `(out, in)` as people read a layer: in -> out; any other shape as its sizes.
    """
    return f"{shape_text(shape[1:])} -> {shape_text(shape[:1])}" if len(shape) == 2 else shape_text(shape)


def fits_shape(expected: Shape, shape: Shape) -> bool:
    """Whether the two agree wherever `expected` tells."""
    return len(expected) == len(shape) and all(e is None or e == s for e, s in zip(expected, shape, strict=True))
