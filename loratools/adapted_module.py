"""AdaptedModule: one module of an adapter with its values as arrays, for people who compute with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

from loratools.errors import UnsupportedError, UsageError
from loratools.short_repr import clipped
from loratools.tensors.lazy import LazyTensor, from_array
from loratools.updates.parts.protocol import Update, flow

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from loratools.algebra.rounding import Floats

    Array: TypeAlias = np.ndarray[Any, Any] | Tensor


@dataclass(frozen=True)
class AdaptedModule:
    """One module of an adapter, with its values as arrays: `adapter["model.layers.0.self_attn.q_proj"]`.

    Values are read from the file on each access.

    Attributes:
        name: The name of the module in the adapter.
        update: The stored update. Its tensors are unread, and its numbers are as stored.

    Example:
        >>> import loratools
        >>> module = loratools.load("fixtures/llama-tiny-science")["model.layers.0.self_attn.q_proj"]
        >>> a, b = module.factors()
        >>> bool(abs(b @ a - module.delta()).max() < 1e-6)
        True
    """

    name: str
    update: Update

    def __repr__(self) -> str:
        rank = f", rank {self.rank}" if self.rank is not None else ""
        sizes = flow(self.shape)
        return f"<AdaptedModule {clipped(self.name)!r}: {self.kind}{rank}, scale {self.scale:g}, {sizes}>"

    @property
    def kind(self) -> str:
        """The kind of update, as `loratools inspect` names it: lora, loha, ia3, ..."""
        return self.update.kind

    @property
    def rank(self) -> int | None:
        """The rank of the factors; None if the kind has none."""
        return self.update.rank

    @property
    def alpha(self) -> float | None:
        """The stored alpha; None if the kind has none."""
        return self.update.alpha

    @property
    def scale(self) -> float:
        """The factor of the product: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        return self.update.scale

    @property
    def shape(self) -> tuple[int | None, ...]:
        """The shape of the weight: (out, in) of a linear layer. Unknown sizes are None."""
        return self.update.shape

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        """The stored tensors by name, unread."""
        return self.update.parts

    @property
    def a(self) -> Floats:
        """The stored factor A, without the scale: (rank, in), a numpy array.

        float64 if it is stored in float64, otherwise float32, which holds 16-bit values exactly.

        Raises:
            UnsupportedError: The kind has no factor A.
        """
        return self._part("A")

    @property
    def b(self) -> Floats:
        """The stored factor B, without the scale: (out, rank), a numpy array.

        float64 if it is stored in float64, otherwise float32, which holds 16-bit values exactly.

        Raises:
            UnsupportedError: The kind has no factor B.
        """
        return self._part("B")

    @overload
    def factors(self, *, as_torch: Literal[False] = False) -> tuple[Floats, Floats]: ...
    @overload
    def factors(self, *, as_torch: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def factors(self, *, as_torch: bool = False) -> tuple[Floats, Floats] | tuple[Tensor, Tensor]:
        """Return the factors `(a, b)` in float64 with the scale in `b`, so that `b @ a` is the delta as a matrix.

        Args:
            as_torch: Return torch tensors instead of numpy arrays.

        Returns:
            `a`: (rank, in) and `b`: (out, rank). For a convolution, `in` is the number of inputs times the size of the
            kernel.

        Raises:
            UnsupportedError: The delta is not a product of factors, or depends on the weights of the base.
        """
        product = self.update.factors()
        if product is None:
            raise UnsupportedError(
                f"'{self.name}' ({self.kind}) is not a product of factors without its base",
                hint="delta() forms the whole matrix; delta(base=weight) where it depends on the weights",
            )
        return (product.a, product.b) if as_torch else (product.a.numpy(), product.b.numpy())

    @overload
    def delta(
        self,
        *,
        base: Array | LazyTensor | None = None,
        dtype: Literal["float32", "float64"] = "float32",
        as_torch: Literal[False] = False,
    ) -> Floats: ...
    @overload
    def delta(
        self,
        *,
        base: Array | LazyTensor | None = None,
        dtype: Literal["float32", "float64"] = "float32",
        as_torch: Literal[True],
    ) -> Tensor: ...
    def delta(
        self,
        *,
        base: Array | LazyTensor | None = None,
        dtype: Literal["float32", "float64"] = "float32",
        as_torch: bool = False,
    ) -> Floats | Tensor:
        """Return the dense change of the weight, scale included: `W + delta` is the adapted weight.

        Args:
            base: The unmodified weight, of shape `shape`. Needed for kinds whose change depends on it (DoRA, IA3,
                OFT, ...), and otherwise ignored.
            dtype: float32 or float64. Computed in float64 and rounded once.
            as_torch: Return a torch tensor instead of a numpy array.

        Returns:
            The delta in the shape of the weight: (out, in) of a linear layer, (out, in, height, width) of a
            convolution, (tokens, width) of an embedding, (experts, out, in) of fused experts.

        Raises:
            UsageError: The change depends on the weight and `base` is not given, or `dtype` is neither of the two.
            MismatchError: The weight has another shape.
        """
        from loratools.updates.parts.dense import dense_delta

        if dtype not in ("float32", "float64"):
            raise UsageError(f"dtype is '{dtype}', and one of float32, float64 is expected")
        values = dense_delta(self.update, self._weight(base), "F64" if dtype == "float64" else "F32")
        if not as_torch:
            return values
        import torch

        return torch.from_numpy(values)

    def _weight(self, base: Array | LazyTensor | None) -> LazyTensor | None:
        from loratools.errors import MismatchError

        if base is None:
            if self.update.needs_base:
                raise UsageError(
                    f"the change of '{self.name}' ({self.kind}) depends on the weight that it is added to",
                    hint="give it: delta(base=weight); loratools.open_checkpoint(BASE).weights[NAME] is one",
                )
            return None
        weight = base if isinstance(base, LazyTensor) else from_array(base)
        if not self.update.fits(weight.shape):
            raise MismatchError(f"'{self.name}' changes a weight of {flow(self.shape)}, and base is {weight.shape}")
        return weight

    def _part(self, name: str) -> Floats:
        from loratools.storage.arrays import read_array

        tensor = self.update.parts.get(name)
        if tensor is None:
            raise UnsupportedError(
                f"'{self.name}' is a {self.kind}, which has no factor {name}",
                details=[f"it has {', '.join(self.update.parts)}"],
                hint="parts has them all; delta() is what they amount to",
            )
        return read_array(tensor, "F64" if tensor.dtype == "F64" else "F32")
