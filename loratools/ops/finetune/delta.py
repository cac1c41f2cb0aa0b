"""One tensor on two sides: by how much it changed, what rounding did, and the delta as certified factors.

Bytes are compared before anything is decoded, since most of a model is often unchanged. A delta is formed in float32,
where the difference of two bfloat16 numbers is exact (their exponents would have to differ by more than 16 for it not
to be); of float64 tensors in float64.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from loratools.ops.common.finite import require_finite_delta
from loratools.quantization.common.noise import quantisation_error
from loratools.storage.casting import rounded
from loratools.tensors.dtypes import torch_dtype
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as TorchDtype

    from loratools.algebra.rank_rules import RankRule
    from loratools.algebra.svd import TruncatedSvd

# Elements of a block of rows, where a result is summed up and not kept.
_BLOCK = 1 << 18
# Below this, the residual in float32 is mostly the rounding of float32.
_ROUNDING = 1e-3
# A change whose mean square is a smaller share of that of the quantisation error does not contain that error.
_HELD_ERROR = 0.5


@dataclass(frozen=True)
class Rounding:
    """What the dtype of a fine-tuned tensor did to its change, and what quantisation did.

    identical: how many of the `elements` are bit for bit those of the base.
    noise: standard deviation of what rounding to the tuned dtype adds to each element, were it independent of all else:
        the root of the mean of `ulp^2 / 12` (Bennett, "Spectra of quantized signals", 1948); with what quantisation
        adds, where the change is large enough to hold it.
    quantisation: standard deviation of the error that quantisation made in each element of either side; 0 where both
        were never quantised.
    """

    elements: int
    identical: int
    noise: float
    quantisation: float = 0.0

    @property
    def quantisation_norm(self) -> float | None:
        """The Frobenius norm of the error of quantisation; None if nothing is quantised."""
        return self.quantisation * math.sqrt(self.elements) if self.quantisation else None

    def edge(self, shape: tuple[int, int]) -> float:
        """The largest singular value that this noise alone is likely to have in a matrix (Geman, 1980)."""
        return self.noise * (math.sqrt(shape[0]) + math.sqrt(shape[1]))


@dataclass(frozen=True, eq=False)
class Decomposed:
    """The matrices of a delta, one or one for each expert, as far as a rule went; None for a matrix of zeros. And what
    rounding has done to them."""

    parts: tuple[TruncatedSvd | None, ...]
    rounding: Rounding

    @property
    def norm(self) -> float:
        return math.sqrt(math.fsum(p.norm**2 for p in self.parts if p is not None))

    @property
    def spectrum(self) -> Tensor:
        """What a unit of rank of all matrices together captures is the square of one of these: (k,)."""
        return self._together([p.s for p in self.parts if p is not None])

    @property
    def all_values(self) -> Tensor:
        """The same of all singular values that were found, beyond the rank."""
        return self._together([p.values for p in self.parts if p is not None])

    @staticmethod
    def _together(values: Sequence[Tensor]) -> Tensor:
        import torch

        squares = [s.square() for s in values]
        most = max(len(s) for s in squares)
        return torch.stack([torch.nn.functional.pad(s, (0, most - len(s))) for s in squares]).sum(0).sqrt()

    @property
    def gap_bound(self) -> float:
        return self._share([(p, p.gap_bound) for p in self.parts if p is not None])

    @property
    def gap_estimate(self) -> float:
        return self._share([(p, p.gap_estimate) for p in self.parts if p is not None])

    def _share(self, gaps: Sequence[tuple[TruncatedSvd, float]]) -> float:
        return math.fsum(gap * p.norm**2 for p, gap in gaps) / self.norm**2


@dataclass(frozen=True, eq=False)
class Extracted:
    """Factors of a delta as they will be stored, `left: (matrices, rows, rank)` and `right: (matrices, rank, columns)`,
    and what was measured on them.

    norm: Frobenius norm of the delta. error: `||delta - left @ right|| / norm`.
    gap_bound, gap_estimate: how much more of the squared norm the best decomposition of this rank could capture
        (`algebra.svd.TruncatedSvd`).
    """

    left: Tensor
    right: Tensor
    norm: float
    error: float
    gap_bound: float
    gap_estimate: float
    rounding: Rounding

    @property
    def rank(self) -> int:
        return int(self.left.shape[-1])


def delta_of(name: str, base: LazyTensor, tuned: LazyTensor, rows: tuple[int, int] | None = None) -> Tensor:
    """Return `tuned - base`, of all rows or of some, in memory of the calling thread that its next delta overwrites.

    Fresh memory for each would cost more in page faults than the decomposition of the delta.

    Raises:
        InputError: Values that are not finite.
    """
    dtype = torch_dtype("F64" if "F64" in (base.dtype, tuned.dtype) else "F32")
    if not base.shape:
        delta = tuned.read().to(dtype) - base.read()
    else:
        start, stop = rows if rows is not None else (0, base.shape[0])
        delta = _memory.sized((stop - start, *base.shape[1:]), dtype)
        for first, last in _blocks(base, stop, start):
            piece = delta[first - start : last - start]
            piece.copy_(tuned.read_rows(first, last))
            piece.sub_(base.read_rows(first, last))
    require_finite_delta(name, delta, tuned, base)
    return delta


class _Memory(threading.local):
    values: Tensor | None = None

    def sized(self, shape: tuple[int, ...], dtype: TorchDtype) -> Tensor:
        import torch

        elements = math.prod(shape)
        if self.values is None or self.values.dtype != dtype or self.values.numel() < elements:
            self.values = None  # the old one goes before the new one comes
            self.values = torch.empty(elements, dtype=dtype)
        return self.values[:elements].view(shape)


_memory = _Memory()


def change(name: str, base: LazyTensor, tuned: LazyTensor) -> float:
    """Frobenius norm of the change, block by block; rows that only one side has count as they are."""
    shared = min(base.shape[0], tuned.shape[0]) if base.shape else 1
    total = 0.0
    for start, stop in _blocks(base, shared):
        total += _squares(delta_of(name, base, tuned, (start, stop) if base.shape else None))
    longer = max(base, tuned, key=lambda t: t.shape[0] if t.shape else 0)
    if longer.shape and longer.shape[0] > shared:
        total += norm(name, longer, shared) ** 2
    return math.sqrt(total)


def changed_rows(base: LazyTensor, tuned: LazyTensor) -> tuple[int, ...]:
    """Numbers of the rows of `tuned` that the base has with other values, or not at all."""
    shared = min(base.shape[0], tuned.shape[0])
    changed: list[int] = []
    for start, stop in _blocks(base, shared):
        # Of two dtypes the wider one holds both; NaN differs from everything, and is refused elsewhere.
        differ = base.read_rows(start, stop).double() != tuned.read_rows(start, stop).double()
        changed += (start + differ.flatten(1).any(1).nonzero().flatten()).tolist()
    return (*changed, *range(shared, tuned.shape[0]))


def norm(name: str, tensor: LazyTensor, start: int = 0) -> float:
    """Frobenius norm of the rows from `start` on, block by block."""
    total = 0.0
    for first, stop in _blocks(tensor, tensor.shape[0] if tensor.shape else 1, start):
        values = (tensor.read_rows(first, stop) if tensor.shape else tensor.read()).double()
        require_finite_delta(name, values, tensor)
        total += _squares(values)
    return math.sqrt(total)


class Deltas:
    """The matrices of one tensor's change, (count, rows, columns), read as they are asked for.

    One matrix is read once, and small ones together; of a stack of large ones, as of fused experts, one is in memory at
    a time. A piece is valid until the next one is read, by the same thread.

    pieces: first matrix and one past the last of each, in order.
    """

    def __init__(self, name: str, base: LazyTensor, tuned: LazyTensor, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self._of = name, base, tuned
        count, rows, columns = shape
        together = max(1, _BLOCK // max(1, rows * columns))
        self.pieces = [(start, min(start + together, count)) for start in range(0, count, together)]
        self._last: tuple[int, Tensor] | None = None
        self.read(self.pieces[0])

    def read(self, piece: tuple[int, int]) -> Tensor:
        """These matrices: (stop - start, rows, columns).

        Raises:
            InputError: Values that are not finite.
        """
        start, stop = piece
        if self._last is not None and self._last[0] == start:
            return self._last[1]
        name, base, tuned = self._of
        stacked = self.shape[0] > 1
        matrices = delta_of(name, base, tuned, (start, stop) if stacked else None).view(-1, *self.shape[1:])
        self._last = start, matrices
        return matrices

    @cached_property
    def quantisation(self) -> float:
        """See `Rounding.quantisation`."""
        _, base, tuned = self._of
        return math.hypot(quantisation_error(base), quantisation_error(tuned))

    @cached_property
    def noise(self) -> float:
        """See `Rounding.noise`."""
        of_rounding, of_quantisation = noise_of(self._of[2]), self.quantisation
        if of_quantisation and self._holds(of_quantisation):
            return math.hypot(of_rounding, of_quantisation)
        return of_rounding

    def _holds(self, error: float) -> bool:
        """Whether the change is so large that an error of this deviation can be part of it.

        It is not where the fine-tune started from the dequantised weights.
        """
        piece = self.read(self.pieces[0])
        return _squares(piece) > _HELD_ERROR * piece.numel() * error**2

    @property
    def edge(self) -> float:
        """See `Rounding.edge`."""
        return Rounding(0, 0, self.noise).edge(self.shape[1:])


def _zeros_in(delta: Tensor) -> int:
    import numpy as np

    # numpy and by pieces that stay in the cache: ten times as fast as torch.count_nonzero.
    flat = delta.numpy().reshape(-1)
    return flat.size - sum(int(np.count_nonzero(flat[at : at + _BLOCK] != 0)) for at in range(0, flat.size, _BLOCK))


def noise_of(tuned: LazyTensor) -> float:
    """What rounding to its dtype adds to each element of a tensor (`Rounding.noise`), by a sample of rows."""
    import torch

    if not tuned.shape or not tuned.elements:
        return 0.0
    rows = tuned.shape[0]
    count = min(rows, max(1, _BLOCK * rows // tuned.elements))
    # Four pieces spread over the tensor: rows of a kind may lie together.
    piece = -(-count // 4)
    starts = sorted({i * (rows - piece) // 3 for i in range(4)}) if rows > piece else [0]
    values = torch.cat([tuned.read_rows(start, min(rows, start + piece)).flatten() for start in starts])
    return math.sqrt(mean_square_ulp(values) / 12)


def mean_square_ulp(values: Tensor) -> float:
    """Mean of the squared spacing of the numbers of their dtype at the values.

    float32 values that are all numbers of bfloat16 are taken for such: a checkpoint that was rounded, and then widened.
    """
    import torch

    dtype = values.dtype
    if dtype == torch.float32 and not bool((values.view(torch.int32) & 0xFFFF).any()):
        dtype = torch.bfloat16
    info = torch.finfo(dtype)
    # frexp writes x as f 2^e with f in [1/2, 1): the spacing there is eps 2^(e-1).
    exponents = torch.frexp(values.double().abs().clamp(min=info.tiny)).exponent - 1
    return float(torch.exp2(2.0 * exponents.double()).mean()) * info.eps**2


def decomposed(
    deltas: Deltas, rule: RankRule, *, tolerance: float | None, seed: int, exact: bool, device: str
) -> Decomposed | None:
    """Each of the matrices decomposed on `device` as far as its rule says.

    Vectors end on the CPU. None if all are zero.
    """
    from loratools.algebra.svd import truncated_svds

    options = {} if tolerance is None else {"tolerance": tolerance}
    parts: list[TruncatedSvd | None] = []
    identical = 0
    for piece in deltas.pieces:
        matrices = deltas.read(piece)
        identical += _zeros_in(matrices)
        for svd in truncated_svds(matrices.to(device), rule, seed=seed, exact=exact, **options):
            on_cpu = replace(svd, u=svd.u.cpu(), s=svd.s.cpu(), vt=svd.vt.cpu(), values=svd.values.cpu())
            parts.append(on_cpu if svd.norm else None)
    if not any(parts):
        return None
    return Decomposed(tuple(parts), _rounding(deltas, identical))


def _rounding(deltas: Deltas, identical: int) -> Rounding:
    return Rounding(math.prod(deltas.shape), identical, deltas.noise, deltas.quantisation)


def stored(deltas: Deltas, decomposition: Decomposed, rank: int, dtype: str) -> Extracted:
    """The leading `rank` of a decomposition as factors in `dtype`, and their error against the delta."""
    import torch

    kind = torch_dtype(dtype)
    count, rows, columns = deltas.shape
    rank = max(1, min(rank, max(len(p.s) for p in decomposition.parts if p is not None)))
    left, right = torch.zeros(count, rows, rank, dtype=kind), torch.zeros(count, rank, columns, dtype=kind)
    for i, part in enumerate(decomposition.parts):
        if part is not None:
            root = part.s[:rank].sqrt()
            left[i, :, : len(root)] = rounded(part.u[:, :rank] * root, dtype)
            right[i, : len(root)] = rounded(root[:, None] * part.vt[:rank], dtype)
    norm = decomposition.norm
    lost = [
        _residual(matrix, left[i], right[i], norm) ** 2
        for start, stop in deltas.pieces
        if any(decomposition.parts[start:stop])
        for i, matrix in enumerate(deltas.read((start, stop)), start)
        if decomposition.parts[i] is not None
    ]
    error = math.sqrt(math.fsum(lost)) / norm
    return Extracted(
        left, right, norm, error, decomposition.gap_bound, decomposition.gap_estimate, decomposition.rounding
    )


def _residual(delta: Tensor, left: Tensor, right: Tensor, norm: float) -> float:
    """`||delta - left @ right||`, formed block by block.

    `||delta||^2 - 2 <delta, left @ right> + ||left @ right||^2` would cost the same product, and cancel.
    """
    fast = _residual_in(delta, left.float(), right.float())
    if fast > _ROUNDING * norm:
        return fast
    return _residual_in(delta, left.double(), right.double())


def _residual_in(delta: Tensor, left: Tensor, right: Tensor) -> float:
    import torch

    rows = max(1, _BLOCK // delta.shape[1])
    total = 0.0
    for start in range(0, delta.shape[0], rows):
        piece, part = delta[start : start + rows].to(left.dtype), left[start : start + rows]
        total += _squares(torch.addmm(piece, part, right, alpha=-1))
    return math.sqrt(total)


def _squares(values: Tensor) -> float:
    """Sum of squares of one block: by rows in its own precision, of the rows in float64."""
    import torch

    if values.dim() < 2:
        return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
    return float(torch.linalg.vector_norm(values.flatten(1), dim=1).double().square().sum())


def _blocks(tensor: LazyTensor, stop: int, start: int = 0) -> list[tuple[int, int]]:
    per_row = tensor.elements // tensor.shape[0] if tensor.shape and tensor.shape[0] else 1
    step = max(1, _BLOCK // max(1, per_row))
    return [(at, min(at + step, stop)) for at in range(start, stop, step)]
