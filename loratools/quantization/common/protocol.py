"""The types that all schemes share: a packed weight, its stored parts, and the parameters that give them a meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from loratools.algebra.level_grid import LevelGrid
    from loratools.algebra.packing import Bytes, Integers
    from loratools.algebra.rounding import Floats


class Part(NamedTuple):
    """One stored tensor of a packed weight.

    role    what the scheme calls it, whatever the module is: `weight`, `absmax`, `scales`, `g_idx`, ...
    name    the name of the stored tensor
    tensor  its values, as they are stored
    """

    role: str
    name: str
    tensor: LazyTensor


class Parameters(Protocol):
    """How the stored parts of one weight are to be read: a scheme's own frozen dataclass of numbers.

    Parameters hold no tensors and no names, so that values which are in no file can be quantised by them as well.
    """

    @property
    def format(self) -> str:
        """The scheme's name for the numbers: `nf4`, `fp8`, `affine`, `Q4_K`."""

    @property
    def bits(self) -> float:
        """Bits of one packed value, its scales not counted."""

    @property
    def group(self) -> int | None:
        """Consecutive values of a row that share a scale; None if whole rows or the whole tensor do."""

    def dequantise(self, weight: PackedWeight, start: int, stop: int) -> Floats:
        """Rows start:stop of the first axis as float32, shape (stop - start, *weight.shape[1:]).

        Every value is one of the weight's dtype: what the runtime computes with, rounded as the runtime rounds.
        """


@runtime_checkable
class Writable(Parameters, Protocol):
    """Parameters of a form that values can be stored in again. Those of other forms are only read."""

    def grid(self, weight: PackedWeight, start: int, stop: int) -> LevelGrid:
        """What the packed numbers of rows start:stop can stand for while all other parts stay as they are stored.

        `start` is a multiple of `row_block`, and so is `stop`, unless it is the number of rows.
        """

    def pack(self, weight: PackedWeight, codes: Integers, start: int, stop: int, packed: Bytes) -> None:
        """Put the codes of rows start:stop among the bytes of the first part, which are given whole and flat."""


@runtime_checkable
class Fresh(Writable, Protocol):
    """Parameters of a form that takes any values, with scales of its own."""

    def quantise(self, weight: PackedWeight, values: Floats, start: int, stop: int, packed: Bytes) -> None:
        """Put values of rows start:stop, scales and codes, among the bytes of the first part, given whole and flat."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight whose numbers are packed: the logical shape and dtype, the stored parts, and what they mean.

    scheme  the name of the entry in `quantization/`
    shape   of the logical weight, as the model computes with it
    dtype   the floating dtype of its values, in the safetensors spelling
    parts   the stored tensors that belong to it and to nothing else; the first holds the packed numbers
    row_block  rows that are unpacked together: reading from a multiple of so many to another costs nothing extra
    """

    scheme: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Part, ...]
    parameters: Parameters
    row_block: int = 1

    @property
    def stored_names(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)

    def tensor(self, role: str) -> LazyTensor:
        """The stored tensor of that role; KeyError where the weight has none."""
        for part in self.parts:
            if part.role == role:
                return part.tensor
        raise KeyError(role)

    def has(self, role: str) -> bool:
        """Whether the weight has a stored tensor of that role."""
        return any(part.role == role for part in self.parts)

    def with_prefix(self, prefix: str) -> PackedWeight:
        """The same weight in a checkpoint that puts `prefix` before the stored names."""
        return replace(self, parts=tuple(part._replace(name=prefix + part.name) for part in self.parts))


@dataclass(frozen=True)
class Unreadable:
    """A weight that is recognised as packed and that is not unpacked, and why not.

    stored  the names of its stored tensors; the first holds the packed numbers
    """

    scheme: str
    stored: tuple[str, ...]
    why: str

    def with_prefix(self, prefix: str) -> Unreadable:
        """The same weight in a checkpoint that puts `prefix` before the stored names."""
        return replace(self, stored=tuple(prefix + name for name in self.stored))


# Logical name -> the weight.
Recognised = Mapping[str, PackedWeight | Unreadable]


class Scheme(Protocol):
    """What the file of a scheme offers."""

    def recognise(self, tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> Recognised:
        """The weights that this scheme has packed, by logical name.

        Decided by the dtypes, shapes and names of the stored tensors. `config` is asked only for what they cannot
        tell: a config may be missing, or left over from before the weights were dequantised.
        """
