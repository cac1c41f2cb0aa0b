"""The values of a source as numbers that rules look at. Each tensor is read in blocks, and none is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING

from loratools.adapter import Adapter
from loratools.checks.common.measured import MeasuredModule
from loratools.checks.common.subject import Subject
from loratools.errors import InputError, LoraToolsError, UnsupportedError
from loratools.matching import Matches
from loratools.ops.check.gains import gain_of, reason_against_gain
from loratools.ops.check.report import NotChecked
from loratools.ops.common.fetching import fetch_values
from loratools.ops.common.fingerprint import FingerprintSums, has_fingerprint
from loratools.ops.common.unreadable import as_ours
from loratools.ops.inspect.values import non_finite_count
from loratools.ops.lowrank.factors import exact_factors
from loratools.tensors.lazy import LazyTensor, from_torch
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.algebra.lowrank import Factors
    from loratools.checkpoints import Checkpoint

_BLOCK_BYTES = 16 << 20
# An update of more bytes than these is read in blocks, once for each thing that is asked of it.
_HELD_BYTES = 256 << 20
# With a subnormal of these dtypes a device may compute as with 0. 8-bit numbers have few others.
_MEASURED = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class MeasuredSubject:
    """A subject with what its values say.

    Attributes:
        subject: The subject.
        sums: Its fingerprint, where that was asked for and it has one.
        not_checked: What could not be measured, and why.
    """

    subject: Subject
    sums: tuple[float, ...] | None = None
    not_checked: tuple[NotChecked, ...] = ()


def measured(subject: Subject, *, base: Checkpoint | None, compares: bool) -> MeasuredSubject:
    """The subject with what its values say; with the reason, where they cannot be read. Each update is read once.

    Args:
        subject: What was opened.
        base: The model that the adapter is for, where it is also measured what rounding to its dtype leaves.
        compares: Whether it is also to be compared with other adapters.
    """
    try:
        fetch_values(*(each for each in (subject.adapter, subject.checkpoint, base) if each is not None))
        if subject.adapter is not None:
            return _measured_adapter(subject, subject.adapter, base, compares)
        if subject.checkpoint is not None:
            weights = subject.checkpoint.weights.items()
            return MeasuredSubject(replace(subject, tensors={name: _not_finite(tensor) for name, tensor in weights}))
    except (LoraToolsError, OSError) as error:
        return MeasuredSubject(replace(subject, error=as_ours(error)))
    return MeasuredSubject(subject)


def _measured_adapter(subject: Subject, adapter: Adapter, base: Checkpoint | None, compares: bool) -> MeasuredSubject:
    modules: dict[str, MeasuredModule] = {}
    gains: dict[str, float] = {}
    without_gain: dict[str, list[str]] = {}
    comparison = _Comparison(adapter) if compares else None
    fit = subject.fit if base is not None else None
    places = fit.updates if isinstance(fit, Matches) else {}
    for name, update in adapter.updates.items():
        in_memory = _in_memory(update)
        factors = in_memory.factors()
        modules[name] = _measured(in_memory, factors)
        is_finite = not modules[name].non_finite
        if comparison is not None:
            comparison.add(name, in_memory, factors if is_finite else None)
        if base is not None and name in places and is_finite:
            if (why := reason_against_gain(update, places[name], base)) is not None:
                without_gain.setdefault(why, []).append(name)
            elif (gain := gain_of(in_memory, places[name], base)) is not None:
                gains[name] = gain
    not_checked = [NotChecked("numerics-gain", why, tuple(names)) for why, names in without_gain.items()]
    if comparison is not None and comparison.why is not None:
        not_checked.append(NotChecked("numerics-duplicate", comparison.why, comparison.names))
    return MeasuredSubject(
        replace(
            subject,
            modules=modules,
            tensors=_of_replacements(adapter),
            gains=gains if isinstance(fit, Matches) else None,
        ),
        comparison.sums if comparison is not None else None,
        tuple(not_checked),
    )


class _Comparison:
    """The fingerprint of an adapter while its modules are read, or why it has none."""

    def __init__(self, adapter: Adapter) -> None:
        self.why: str | None = None
        self.names: tuple[str, ...] = ()
        self._adapter = adapter
        self._sums = FingerprintSums()
        if not has_fingerprint(adapter):
            self._give_up("there are replaced weights" if adapter.replacements else "there are no updates", ())

    def add(self, name: str, update: Update, factors: Factors | None) -> None:
        """Add a module; factors: those of the update where it has some, and their values are finite."""
        if self.why is not None:
            return
        try:
            self._sums.add(factors if factors is not None else exact_factors(update, name, self._adapter.name))
        except UnsupportedError:
            self._give_up("updates depend on the weights of their base", (name,))
        except InputError:
            self._give_up("values are not finite", (name,))

    @property
    def sums(self) -> tuple[float, ...] | None:
        return self._sums.sums if self.why is None else None

    def _give_up(self, why: str, names: tuple[str, ...]) -> None:
        self.why, self.names = why, names


def _in_memory(update: Update) -> Update:
    """The update with its tensors read, so that all that is asked of them reads them once; large ones stay on disk."""
    if sum(tensor.nbytes for tensor in update.parts.values()) > _HELD_BYTES or not is_dataclass(update):
        return update
    tensors = {field.name: getattr(update, field.name) for field in fields(update)}
    read = {
        name: from_torch(tensor.read())
        for name, tensor in tensors.items()
        if isinstance(tensor, LazyTensor) and tensor.dtype in _MEASURED
    }
    return replace(update, **read)


def _of_replacements(adapter: Adapter) -> dict[str, int]:
    return {name: _not_finite(replacement.tensor) for name, replacement in adapter.replacements.items()}


def _not_finite(tensor: LazyTensor) -> int:
    return non_finite_count(tensor, lambda nbytes: None) or 0


def _measured(update: Update, factors: Factors | None) -> MeasuredModule:
    from loratools.algebra.lowrank import singular_values
    from loratools.ops.spectrum.modules import numerical_rank_of_update

    non_finite = subnormal = nonzero = 0
    for tensor in {id(tensor.source): tensor for tensor in update.parts.values()}.values():
        if tensor.dtype not in _MEASURED:
            non_finite += _not_finite(tensor)
            continue
        for block in _blocks(tensor):
            finite = int(block.isfinite().sum())
            non_finite += block.numel() - finite
            nonzero += int(block.count_nonzero())
            subnormal += _subnormal_count(block)
    share = subnormal / nonzero if nonzero else 0.0
    size = math.prod(size for size in update.shape if size is not None)
    module = MeasuredModule(non_finite=non_finite, subnormal_share=share, rank=update.rank, size=size)
    # A decomposition has no answer for what is not finite; of some kinds there are no factors without the base.
    if non_finite or factors is None:
        return module
    values = singular_values(factors)
    return module._replace(
        numerical_rank=numerical_rank_of_update(update, factors, values),
        norm=float(values.norm()),
        rows=factors.b.shape[0],
        zero_rows=int((~factors.b.any(dim=1)).sum()),
    )


def _subnormal_count(block: Tensor) -> int:
    import torch

    # Compared in the dtype itself: on the way to another one, subnormals may become 0.
    magnitude = block.abs()
    return int(((magnitude > 0) & (magnitude < torch.finfo(block.dtype).tiny)).sum())


def _blocks(tensor: LazyTensor) -> Iterator[Tensor]:
    if not tensor.shape:
        yield tensor.read()
        return
    count = max(1, -(-tensor.nbytes // _BLOCK_BYTES))
    rows = max(1, -(-tensor.shape[0] // count))
    for start in range(0, tensor.shape[0], rows):
        yield tensor.read_rows(start, min(start + rows, tensor.shape[0]))
