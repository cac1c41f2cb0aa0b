"""Check that a written adapter has the deltas of its source: `dW x` of both, per module, on random x, in float64.

The bound is what rounding to the stored dtypes explains: B and A are each rounded once, a scale may be folded into one
of them, and alpha is stored in float32 at least. A larger error is a bug of the writer or of the reader, and nothing is
committed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from loratools.adapter import Adapter
from loratools.ops.convert.compared import ComparedModules
from loratools.tensors.dtypes import FLOAT_DTYPES
from loratools.tensors.lazy import LazyTensor, from_torch
from loratools.tensors.views import reshaped
from loratools.updates.parts.dense import unread_base
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.algebra.lowrank import Factors

_SAMPLES = 4
# Half the smallest positive number of the dtype: what an entry below its normal range may lose.
_SMALLEST = {"F64": 2.0**-1075, "F32": 2.0**-150, "F16": 2.0**-25, "BF16": 2.0**-134}
# Roundings that one product may go through: of B, of A, of a scale folded in, and of alpha.
_ROUNDINGS = 4
# Rows of dense deltas that are compared at a time.
_ROWS = 256


@dataclass(frozen=True)
class Piece:
    """Rows of a module of the source (`source_rows`, all if None), and their place in a module of the result."""

    module: str
    source_rows: tuple[int, int] | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class ConvertedModule:
    """The error of one module or replaced weight of a conversion.

    Attributes:
        name: Its name in the result.
        error: The relative Frobenius norm of the difference of `dW x` for random x, in float64.
        explained: The largest error that rounding to the stored dtype explains.
    """

    name: str
    error: float
    explained: bool


def compare(
    source: Adapter,
    result: Adapter,
    pieces: Mapping[str, tuple[Piece, ...]],
    left_out: Collection[str] = (),
    comparisons: ComparedModules | None = None,
) -> list[ConvertedModule]:
    """The error of every module and every replaced weight of the result.

    pieces: where the modules of the source went; modules that are not listed kept their name. left_out: what must be
    missing from the result: modules by their names in the result, and replaced weights.
    comparisons: those that a killed run has made, and where others are noted.
    """
    compared = comparisons or ComparedModules()
    parts_of: dict[str, list[tuple[str, Piece]]] = {name: [] for name in result.updates}
    lost: list[ConvertedModule] = []
    for name, update in source.updates.items():
        if update.rank == 0:
            continue  # nothing changes there, and most formats cannot store that
        if not _all_rows_went(update, pieces.get(name)):
            lost.append(ConvertedModule(name, float("inf"), False))
        for piece in pieces.get(name, (Piece(name),)):
            if piece.module in left_out:
                continue
            if piece.module in parts_of:
                parts_of[piece.module].append((name, piece))
            elif not _is_zero(update):
                lost.append(ConvertedModule(name, float("inf"), False))
    checked = []
    for name, parts in parts_of.items():
        update = result.updates[name]
        check = partial(_checked_update, source, name, update, parts)
        checked.append(compared.once(name, update.parts.values(), (update.kind, update.scale, update.shape), check))
    for name, replacement in result.replacements.items():
        of = source.replacements.get(name)
        check = partial(_checked_tensor, name, of.tensor if of is not None else None, replacement.tensor)
        checked.append(compared.once(f"weight {name}", [replacement.tensor], replacement.rows, check))
    lost += [
        ConvertedModule(n, float("inf"), False)
        for n in source.replacements
        if n not in (*left_out, *result.replacements)
    ]
    return sorted([*checked, *lost], key=lambda c: c.name)


def _is_zero(update: Update) -> bool:
    """Whether the update is zero. Untrained parts of a fused module are left out when it is split."""
    factors = update.factors()
    return factors is not None and not bool(factors.b.any() and factors.a.any())


def _all_rows_went(update: Update, pieces: tuple[Piece, ...] | None) -> bool:
    """Whether the rows outside of all pieces are zero."""
    if pieces is None or any(piece.source_rows is None for piece in pieces):
        return True
    factors = _product(update)
    if factors is None:
        return False
    import torch

    unused_rows = torch.ones(factors.out_features, dtype=torch.bool)
    for piece in pieces:
        unused_rows[slice(*(piece.source_rows or (None,)))] = False
    return not bool(factors.b[unused_rows].any())


def _checked_update(source: Adapter, name: str, result: Update, parts: list[tuple[str, Piece]]) -> ConvertedModule:
    if len(parts) == 1 and parts[0][1].source_rows is None and parts[0][1].rows is None:
        of = source.updates[parts[0][0]]
        if of.as_lora() is None or result.as_lora() is None:
            # Not a product of two factors. The kind is defined by its parts, including what they are multiplied by.
            return _checked_parts(name, of, result)
        if of.shape != result.shape:
            return ConvertedModule(name, float("inf"), False)
    magnitude_check = _checked_magnitude(source, name, result, parts)
    import torch

    product = _product(result)
    if product is None:
        return ConvertedModule(name, float("inf"), False)
    x = torch.randn(product.in_features, _SAMPLES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.zeros(product.out_features, _SAMPLES, dtype=torch.float64)
    room = torch.zeros_like(expected)
    unit, smallest = _precision(result.parts.values())
    for original, piece in parts:
        factors = _product(source.updates[original])
        rows, into = slice(*(piece.source_rows or (None,))), slice(*(piece.rows or (None,)))
        if factors is None or factors.in_features != product.in_features:
            return ConvertedModule(name, float("inf"), False)
        b = factors.b[rows]
        if b.shape[0] != expected[into].shape[0]:
            return ConvertedModule(name, float("inf"), False)
        expected[into] += b @ (factors.a @ x)
        room[into] += _rounding_error(b, factors, x, unit, smallest, result.scale)
    error = (product.b @ (product.a @ x) - expected).norm()
    size = expected.norm()
    checked = ConvertedModule(name, float(error / size) if size else float(error), bool(error <= room.norm()))
    return (
        checked if magnitude_check is None else max(checked, magnitude_check, key=lambda c: (not c.explained, c.error))
    )


def _product(update: Update) -> Factors | None:
    """The factors of the product; with DoRA, those without the magnitude."""
    if (lora := update.as_lora()) is not None and lora.magnitude is not None:
        return replace(lora, magnitude=None).factors()
    return update.factors()


def _checked_magnitude(
    source: Adapter, name: str, result: Update, parts: list[tuple[str, Piece]]
) -> ConvertedModule | None:
    """The magnitudes of DoRA, assembled from those of the source; None if there are none."""
    expected = []
    written = result.as_lora()
    for original, piece in sorted(parts, key=lambda p: (p[1].rows or (0, 0))[0]):
        of = source.updates[original].as_lora()
        if of is not None and of.magnitude is not None:
            if written is None or of.magnitude_of != written.magnitude_of:
                return ConvertedModule(name, float("inf"), False)
            # Some formats store it with axes of size 1.
            expected.append(
                reshaped(of.magnitude, (of.magnitude.elements,)).read()[slice(*(piece.source_rows or (None,)))]
            )
    magnitude = None if written is None else written.magnitude
    if not expected and magnitude is None:
        return None
    if not expected or magnitude is None:
        return ConvertedModule(name, float("inf"), False)
    import torch

    return _checked_tensor(name, from_torch(torch.cat(expected)), reshaped(magnitude, (magnitude.elements,)))


def _rounding_error(b: Tensor, factors: Factors, x: Tensor, unit: float, smallest: float, scale: float) -> Tensor:
    inner = factors.a.abs() @ x.abs()
    through_a = smallest * b.abs().sum(1, keepdim=True) * x.abs().sum(0)
    through_b = smallest * abs(scale) * inner.sum(0)
    # A few units of float64, for the products themselves.
    return (_ROUNDINGS * unit + 2.0**-45) * (b.abs() @ inner) + through_a + through_b


def _checked_parts(name: str, source: Update, result: Update) -> ConvertedModule:
    if (experts := source.as_experts()) is not None and (written := result.as_experts()) is not None:
        source, result = experts.packed_as_peft(), written.packed_as_peft()
    if source.kind != result.kind or source.parts.keys() != result.parts.keys():
        return ConvertedModule(name, float("inf"), False)
    shapes = {part: tensor.shape for part, tensor in source.parts.items()}
    other_parts = shapes != {part: tensor.shape for part, tensor in result.parts.items()}
    if (other_parts or source.scale != result.scale) and source.shape == result.shape and not source.needs_base:
        return _checked_delta(name, source, result)
    if source.rank != result.rank:
        return ConvertedModule(name, float("inf"), False)
    each = [_checked_tensor(name, source.parts[part], result.parts[part]) for part in source.parts]
    unit, _ = _precision(result.parts.values())
    scales = abs(source.scale - result.scale) / abs(source.scale) if source.scale else abs(result.scale)
    worst = max([scales, *(c.error for c in each)])
    return ConvertedModule(name, worst, all(c.explained for c in each) and scales <= max(unit, 2.0**-23))


def _checked_delta(name: str, source: Update, result: Update) -> ConvertedModule:
    """Both sides as dense deltas, for parts that cannot be compared directly: joined, or with the scale folded in."""
    import torch

    delta = source.prepare(unread_base(source), weight=1.0, dtype="F64")
    error, size = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    room = torch.zeros((), dtype=torch.float64)
    written = result.prepare(unread_base(result), weight=1.0, dtype="F64")
    unit, smallest = _precision(result.parts.values())
    factors = len(result.parts)
    for start in range(0, delta.shape[0], _ROWS):
        stop = min(start + _ROWS, delta.shape[0])
        expected, actual = (torch.from_numpy(d.rows(start, stop)) for d in (delta, written))
        error += (actual - expected).square().sum()
        size += expected.square().sum()
        room += torch.from_numpy(delta.magnitude(start, stop)).square().sum()
    allowed = (factors * unit + 2.0**-45) * room.sqrt() + smallest * (delta.shape[0] * delta.shape[1]) ** 0.5
    relative = float(error.sqrt() / size.sqrt()) if size else float(error.sqrt())
    return ConvertedModule(name, relative, bool(error.sqrt() <= allowed))


def _checked_tensor(name: str, source: LazyTensor | None, result: LazyTensor) -> ConvertedModule:
    if source is None or source.shape != result.shape:
        return ConvertedModule(name, float("inf"), False)
    if source.dtype not in FLOAT_DTYPES or result.dtype not in FLOAT_DTYPES:
        equal = source.dtype == result.dtype and bool((source.read() == result.read()).all())
        return ConvertedModule(name, 0.0 if equal else float("inf"), equal)
    expected, actual = source.read().double(), result.read().double()
    unit, smallest = _precision([result])
    error, size = (actual - expected).norm(), expected.norm()
    room = unit * size + smallest * expected.numel() ** 0.5
    return ConvertedModule(name, float(error / size) if size else float(error), bool(error <= room))


def _precision(tensors: Iterable[LazyTensor]) -> tuple[float, float]:
    """The largest unit roundoff and smallest number among the dtypes of these tensors."""
    from loratools.algebra.rounding import unit_roundoff

    dtypes = {t.dtype for t in tensors if t.dtype in FLOAT_DTYPES} or {"F32"}
    return max(unit_roundoff(d) for d in dtypes), max(_SMALLEST[d] for d in dtypes)
