"""The spectrum of one module: of an update, from its factors, and of a pair of weights, from its decomposition."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.ops.extract.rank_policy import ABOVE_EDGE
from loratools.ops.finetune.delta import Decomposed
from loratools.ops.finetune.pairs import Pair
from loratools.ops.lowrank.factors import exact_factors
from loratools.ops.spectrum.report import ModuleSpectrum
from loratools.tensors.dtypes import is_floating
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.algebra.lowrank import Factors

# Energy below this share of all is rounding.
_ROUNDING = 1e-10


def spectrum_of_update(name: str, update: Update, adapter_name: str) -> ModuleSpectrum:
    """The spectrum of an update that has factors: all singular values."""
    from loratools.algebra.lowrank import singular_values

    factors = exact_factors(update, name, adapter_name)
    values = singular_values(factors)
    return _module_spectrum(
        name,
        tuple(size for size in update.shape if size is not None),
        values,
        unknown_energy=0.0,
        matrix=(factors.out_features, factors.in_features),
        numerical_rank=numerical_rank_of_update(update, factors, values),
        complete=True,
        count=1,
    )


def numerical_rank_of_update(update: Update, factors: Factors, values: Tensor) -> int:
    """How many of the singular values of an update are above what rounding its stored parts can have made."""
    from loratools.algebra.lowrank import noise_of_factors
    from loratools.algebra.rounding import unit_roundoff

    # An entry of a factor is a product of at most all stored parts but those of the other factor.
    units = [unit_roundoff(t.dtype) for t in update.parts.values() if is_floating(t.dtype)]
    unit = max(units) * max(1, len(update.parts) - 1)
    return int((values > noise_of_factors(factors, unit)).sum())


def spectrum_of_pair(pair: Pair, decomposition: Decomposed) -> ModuleSpectrum:
    """The spectrum of the change of a weight, beside the noise that rounding to its dtype makes."""
    from loratools.algebra.lowrank import numerical_rank
    from loratools.algebra.rounding import unit_roundoff
    from loratools.algebra.spectrum import gavish_donoho_cut

    rounding = decomposition.rounding
    count, rows, columns = pair.matrices
    exact = all(part is None or part.method in ("gram", "dense") for part in decomposition.parts)
    values = decomposition.all_values if exact else decomposition.spectrum
    energy = decomposition.norm**2
    unknown_energy = energy - float(values.square().sum())
    complete = exact or unknown_energy <= _ROUNDING * energy
    spectrum = _module_spectrum(
        pair.target,
        pair.base.shape,
        values,
        unknown_energy=0.0 if complete else max(0.0, unknown_energy),
        matrix=(rows, columns),
        numerical_rank=numerical_rank(values, (rows, columns), unit_roundoff("F32")),
        complete=complete,
        count=count,
    )
    # Of experts, the noise of all adds up.
    spread = math.sqrt(count)
    edge = spread * rounding.edge((rows, columns))
    cut = spread * gavish_donoho_cut(rounding.noise, (rows, columns))
    return replace(
        spectrum,
        noise_edge=edge,
        above_edge=int((values > ABOVE_EDGE * edge).sum()),
        optimal_cut=cut,
        above_cut=int((values > cut).sum()),
        identical=rounding.identical / max(1, rounding.elements),
        quantization_error=rounding.quantisation_norm,
    )


def _module_spectrum(
    name: str,
    shape: tuple[int, ...],
    values: Tensor,
    *,
    unknown_energy: float,
    matrix: tuple[int, int],
    numerical_rank: int,
    complete: bool,
    count: int,
) -> ModuleSpectrum:
    """The numbers that follow from singular values: `count` matrices of this size have these and `unknown_energy`."""
    from loratools.algebra.spectrum import effective_rank_estimate

    energy = float(values.square().sum()) + unknown_energy
    largest = float(values[0]) if values.numel() else 0.0
    unknown = 0 if complete else min(matrix) - len(values)
    return ModuleSpectrum(
        name=name,
        shape=shape,
        singular_values=tuple(values.tolist()),
        complete=complete,
        norm=math.sqrt(energy),
        stable_rank=energy / largest**2 if largest else 0.0,
        effective_rank=effective_rank_estimate(values, unknown_energy, unknown),
        numerical_rank=numerical_rank if complete or numerical_rank < len(values) else None,
        cost=count * sum(matrix),
    )
