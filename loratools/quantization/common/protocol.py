"""Types that all schemes share: a packed weight, its stored parts, and the parameters that dequantise them."""

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

    role    the scheme's name of the part, for any module: `weight`, `absmax`, `scales`, `g_idx`, ... name    the name
    of the stored tensor tensor  its stored values
    """

    role: str
    name: str
    tensor: LazyTensor


class Parameters(Protocol):
    """How to dequantise the stored parts of one weight: each scheme has a frozen dataclass of numbers.

    Parameters hold no tensors and no names, so that values which are in no file can be quantised with them as well.
    """

    @property
    def format(self) -> str:
        """The scheme's name of the number format: `nf4`, `fp8`, `affine`, `Q4_K`."""

    @property
    def bits(self) -> float:
        """Bits of one packed value, without its scales."""

    @property
    def group(self) -> int | None:
        """Consecutive values of a row that share a scale; None if whole rows or the whole tensor do."""

    def dequantise(self, weight: PackedWeight, start: int, stop: int) -> Floats:
        """Rows start:stop of the first axis as float32, shape (stop - start, *weight.shape[1:]).

        Every value is representable in the weight's dtype: the runtime computes with it, and rounds in the same way.
        """


@runtime_checkable
class Writable(Parameters, Protocol):
    """Parameters of a format in which values can be stored again. Other formats can only be read."""

    def grid(self, weight: PackedWeight, start: int, stop: int) -> LevelGrid:
        """The values that the codes of rows start:stop can represent while all other parts stay as they are stored.

        `start` is a multiple of `row_block`, and so is `stop`, unless it is the number of rows.
        """

    def pack(self, weight: PackedWeight, codes: Integers, start: int, stop: int, packed: Bytes) -> None:
        """Write the codes of rows start:stop into the bytes of the first part, which are given in full as a
        flat array.
        """


@runtime_checkable
class Fresh(Writable, Protocol):
    """Parameters of a format in which arbitrary values can be stored, with new scales."""

    def quantise(self, weight: PackedWeight, values: Floats, start: int, stop: int, packed: Bytes) -> None:
        """Write values of rows start:stop, as scales and codes, into the bytes of the first part, given in full as a
        flat array.
        """


@dataclass(frozen=True)
class PackedWeight:
    """A packed weight: its logical shape and dtype, its stored parts, and its parameters.

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
        """The stored tensor in that role; KeyError if the weight has none."""
        for part in self.parts:
            if part.role == role:
                return part.tensor
        raise KeyError(role)

    def has(self, role: str) -> bool:
        """Whether the weight has a stored tensor in that role."""
        return any(part.role == role for part in self.parts)

    def with_prefix(self, prefix: str) -> PackedWeight:
        """The same weight in a checkpoint whose stored names get `prefix` in front."""
        return replace(self, parts=tuple(part._replace(name=prefix + part.name) for part in self.parts))


@dataclass(frozen=True)
class Unreadable:
    """A weight that is recognised as packed but cannot be unpacked, and why not.

    stored  the names of its stored tensors; the first holds the packed numbers
    """

    scheme: str
    stored: tuple[str, ...]
    why: str

    def with_prefix(self, prefix: str) -> Unreadable:
        """The same weight in a checkpoint whose stored names get `prefix` in front."""
        return replace(self, stored=tuple(prefix + name for name in self.stored))


# From logical name to weight.
Recognised = Mapping[str, PackedWeight | Unreadable]


class Scheme(Protocol):
    """The contents of a scheme's file."""

    def recognise(self, tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> Recognised:
        """Recognise the weights that this scheme has packed, by logical name.

        Decided by the dtypes, shapes and names of the stored tensors. `config` is used only for what they cannot
        decide: a config may be missing, or outdated since the weights were dequantised.
        """
