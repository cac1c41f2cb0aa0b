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
    def alpha(self) -> float | None:
        """The alpha that the scale is computed from, as stored; None if the kind has none."""
        ...

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
        """Return the update with the given alpha, if `assumes_alpha`; otherwise the update itself.

        Args:
            alpha: The alpha that the adapter was trained with.

        Returns:
            An update of the same kind.
        """

    @property
    def reads_layer_weight(self) -> bool:
        """Whether an update of a bias depends on the weight of the same layer (`with_layer_weight`)."""

    def with_layer_weight(self, weight: LazyTensor) -> Update:
        """Return the update with the weight of its layer, if it depends on that; otherwise the update itself.

        Args:
            weight: The unmodified weight of the layer, (out, in).

        Returns:
            An update of the same kind.
        """

    def as_lora(self) -> LoRA | None:
        """Its tensors as a pair of factors, perhaps with a magnitude or a core; None if they are none."""

    def as_full(self) -> Full | None:
        """Its tensor as the difference of a whole weight; None if it stores something else."""

    def as_experts(self) -> LoRAExperts | None:
        """Its tensors as factors of all experts of one parameter; None if its weight has no experts of its own."""

    def cut_rows(self, start: int, stop: int) -> Update | None:
        """Return the update of some of the outputs, of the same kind.

        Args:
            start: The first output.
            stop: The output after the last.

        Returns:
            The update of the outputs start:stop; None if the kind cannot be cut there.
        """

    def stack_rows(self, others: Sequence[Update]) -> Update | None:
        """Return one update with the outputs of this one, followed by the outputs of others with the same inputs.

        Args:
            others: The updates to append, in order.

        Returns:
            The stacked update; None if the kind cannot be stacked without changing the delta.
        """

    def delta(self, *, base: LazyTensor | None = None) -> Floats:
        """Return the dense change of the weight, scale included, computed in float64.

        Args:
            base: The unmodified weight; needed if `needs_base`.

        Returns:
            The delta in the shape of the weight, in float32.
        """

    def lycoris_parts(self) -> Mapping[str, LazyTensor] | None:
        """Its tensors with the numbers that LyCORIS has for the kind; None if these cannot say the same."""

    def lycoris_alpha(self) -> float | None:
        """What LyCORIS stores as alpha, which is no alpha of every kind; None if it stores none."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether this can be an update of a weight of the given shape (most kinds use `fits_shape`).

        Args:
            shape: The shape of the weight, as the layer computes with it.

        Returns:
            True if it can.
        """

    def factors(self) -> Factors | None:
        """Return the two factors of the delta.

        Returns:
            `b: (out, rank)` and `a: (rank, in x kernel)` in float64, with the scale in `b`; `b @ a` is the delta. None
            if the delta is not low rank, if its shape is unknown, or if it depends on the base.
        """

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        """Read what is needed to compute rows of `weight * delta`.

        Args:
            base: The unmodified weight, in the orientation of `shape`; read only if `needs_base`.
            weight: The factor of the delta.
            dtype: The dtype of the computation: F32 or F64.

        Returns:
            The weighted delta as a matrix.
        """


class Delta(Protocol):
    """A weighted delta as a matrix whose rows are computed as numpy arrays.

    numpy and not torch, since importing torch takes longer than merging a model of a billion weights.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix: (rows, columns)."""
        ...

    @property
    def terms(self) -> int:
        """The number of products summed in one element: the `r` of the error bound."""

    def rows(self, start: int, stop: int, base: Floats | None = None, *, out: Floats | None = None) -> Floats:
        """Return rows of the matrix, in the dtype that it was prepared in.

        Args:
            start: The first row.
            stop: The row after the last.
            base: The same rows of the unmodified weight, in the same dtype, for kinds that need them.
            out: An array to write to; a new one if None.

        Returns:
            The rows, (stop - start, columns).
        """

    def energy(self, start: int, stop: int) -> float | None:
        """Return the sum of squares of some rows, if it can be computed without forming them.

        Args:
            start: The first row.
            stop: The row after the last.

        Returns:
            The sum; None if the rows would have to be formed.
        """

    def magnitude(self, start: int, stop: int, base: Floats | None = None) -> Floats:
        """Return an upper bound of the magnitudes that the rounding errors are proportional to: the sum of |b| |a|.

        Args:
            start: The first row.
            stop: The row after the last.
            base: The same rows of the unmodified weight, for kinds that need them.

        Returns:
            The bound for each element, (stop - start, columns).
        """

    def input_directions(self) -> Floats | None:
        """Return rows that span the inputs that the factors read, (k, columns); None if there are no such factors."""

    def transposed(self) -> Delta:
        """Return the transpose of the matrix."""

    def part(self, rows: Index, columns: Index) -> Delta:
        """Return some of the rows and columns, in the given order.

        Args:
            rows: A slice, or the indices of the rows.
            columns: A slice, or the indices of the columns.

        Returns:
            The part as a matrix.
        """


def flow(shape: Shape) -> str:
    """Return a shape as people read a layer.

    `(out, in)` as people read a layer: in -> out; any other shape as its sizes.
    """
    return f"{shape_text(shape[1:])} -> {shape_text(shape[:1])}" if len(shape) == 2 else shape_text(shape)


def fits_shape(expected: Shape, shape: Shape) -> bool:
    """Whether the two agree wherever `expected` tells."""
    return len(expected) == len(shape) and all(e is None or e == s for e, s in zip(expected, shape, strict=True))
