"""LazyTensor: shape, dtype, and a promise to read the values, or a range of rows of them.

Headers are read first and values only where they are used, so a 70B checkpoint costs its headers.
Importing this file costs nothing: torch is imported where values are read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from loratools.errors import UsageError
from loratools.tensors.dtypes import DTYPE_BITS, dtype_name
from loratools.tensors.files import ByteRange

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class Source(Protocol):
    """The source of the values of a LazyTensor. Sources are comparable and picklable, and hold no open file."""

    @property
    def location(self) -> ByteRange | None:
        """The byte range in a file that holds exactly the values of the tensor; None if there is none."""

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Return rows start:stop of the first axis, in the stored dtype, contiguous and owned by the caller.

        Args:
            start: The first row.
            stop: The row after the last. A tensor without axes has one row.

        Returns:
            A torch tensor, (stop - start, *shape[1:]).
        """

    def scalar(self) -> float:
        """Return the value of a one-element tensor."""


class View(Source, Protocol):
    """A source that reads other tensors without computing new values."""

    @property
    def of(self) -> tuple[LazyTensor, ...]:
        """The tensors that it reads."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose values are read on access.

    Attributes:
        shape: The size of each axis; `()` of a scalar.
        dtype: The dtype in the spelling of safetensors: F32, BF16, F16, I64, ...
        source: Where the values come from: a range of bytes in a file, a view of other tensors, or memory.

    Example:
        >>> import loratools
        >>> weights = loratools.open_checkpoint("fixtures/llama-tiny").weights
        >>> weights["model.norm.weight"].read().shape == weights["model.norm.weight"].shape
        True
    """

    shape: tuple[int, ...]
    dtype: str
    source: Source

    def __repr__(self) -> str:
        return f"<LazyTensor {self.dtype} {self.shape}>"

    def __hash__(self) -> int:
        # The source identifies the values, so it almost never allows more than one shape and dtype.
        return hash(self.source)

    @property
    def elements(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size of the values in `dtype`, in bytes."""
        return (self.elements * DTYPE_BITS[self.dtype] + 7) // 8

    @property
    def location(self) -> ByteRange | None:
        """The byte range in a file that holds exactly the values; None if there is none."""
        return self.source.location

    def read(self) -> Tensor:
        """Return all values as a torch tensor, in the stored dtype and in this tensor's shape."""
        if not self.shape:
            return self.source.read_rows(0, 1).reshape(())
        return self.read_rows(0, self.shape[0])

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Return rows start:stop of the first axis as a torch tensor, in the stored dtype.

        Args:
            start: The first row.
            stop: The row after the last.

        Returns:
            The rows, (stop - start, *shape[1:]).
        """
        return self.source.read_rows(start, stop).reshape(stop - start, *self.shape[1:])

    def scalar(self) -> float:
        """Return the value of a one-element tensor. For a tensor in a file, torch is not imported."""
        if self.elements != 1:
            raise ValueError(f"a tensor of shape {self.shape} is not a scalar")
        return self.source.scalar()


@dataclass(frozen=True, eq=False)
class _InMemory:
    """Values in memory."""

    values: Tensor

    @property
    def location(self) -> ByteRange | None:
        return None

    def read_rows(self, start: int, stop: int) -> Tensor:
        rows = self.values.reshape(1) if self.values.dim() == 0 else self.values
        return rows[start:stop].clone()

    def scalar(self) -> float:
        return float(self.values.double().item())


def from_torch(values: Tensor) -> LazyTensor:
    """A tensor in memory, as a LazyTensor."""
    return LazyTensor(tuple(values.shape), dtype_name(values.dtype), _InMemory(values))


def from_array(values: np.ndarray[Any, Any] | Tensor) -> LazyTensor:
    """A numpy array or a torch tensor, as a LazyTensor of the same values.

    Raises:
        UsageError: It is neither, or its dtype cannot be stored.
    """
    import numpy as np
    import torch

    try:
        tensor = torch.from_numpy(np.ascontiguousarray(values)) if isinstance(values, np.ndarray) else values
        return from_torch(tensor.detach().cpu())
    except (AttributeError, KeyError, TypeError):
        kind = f"an array of {values.dtype}" if hasattr(values, "dtype") else f"of type {type(values).__name__}"
        raise UsageError(
            f"a tensor is {kind}, and a numpy array or a torch tensor of numbers is expected",
            hint="numpy.asarray(values, dtype='float32') makes one of a list",
        ) from None


def viewed(tensor: LazyTensor) -> list[LazyTensor]:
    """The tensors that are read for a view, through any number of views; for another tensor, the tensor itself."""
    if not _is_view(source := tensor.source):
        return [tensor]
    return [leaf for part in source.of for leaf in viewed(part)]


# By an attribute of the class: to ask a protocol whether a value is one of it takes longer than to read a small tensor.
def _is_view(source: Source) -> TypeGuard[View]:
    return hasattr(type(source), "of")
