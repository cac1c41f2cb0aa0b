"""Rules that choose the rank, asked of spectra that are known, and of matrices that have them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loratools.algebra.lowrank import Factors, noise_of_factors, singular_values
from loratools.algebra.rank_rules import Above, AtMost, Fixed, Lost, lost_for_energy, lost_for_error, scaled
from loratools.algebra.svd import truncated_svd
from loratools.ops.lowrank.limit import Limit
from loratools.ops.lowrank.reduce import reduced


def turned(values: np.ndarray, m: int, n: int) -> torch.Tensor:
    """A float32 matrix with these singular values, to rounding."""
    generator = torch.Generator().manual_seed(5)
    u, v = (torch.linalg.qr(torch.randn(k, len(values), generator=generator, dtype=torch.float64)).Q for k in (m, n))
    return ((u * torch.as_tensor(values)) @ v.T).float()


def smallest(values: np.ndarray, energy: float) -> int:
    """The smallest rank that keeps this share of the sum of squares, in float64."""
    kept = np.cumsum(values**2) / np.sum(values**2)
    return int(np.argmax(kept >= energy * (1 - 1e-9))) + 1


def squares(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).square()


def test_energy_and_error_are_the_smallest_rank_that_keeps_them() -> None:
    found = squares(3, 2, 1, 1)

    ranks = [lost_for_energy(e).rank(found, 15.0, complete=True) for e in (0.1, 0.6, 0.61, 13 / 15, 0.9, 1.0)]

    assert ranks == [1, 1, 2, 2, 3, 4]
    assert [lost_for_error(e).rank(found, 15.0, complete=True) for e in (0.0, (2 / 15) ** 0.5, 0.9)] == [4, 2, 1]


def test_what_is_not_found_yet_is_not_guessed() -> None:
    found = squares(3, 2)

    assert lost_for_energy(0.5).rank(found, 15.0, complete=False) == 1
    assert lost_for_energy(0.9).rank(found, 15.0, complete=False) is None
    assert Lost(1e-9).rank(found, 13.0, complete=False) is None  # below the rounding of sums in float32
    assert Above(1.5).rank(found, 15.0, complete=False) is None
    assert Above(2.5).rank(found, 15.0, complete=False) == 1
    assert Fixed(3).rank(found, 15.0, complete=False) is None
    assert AtMost(Above(0.0), 2).rank(found, 15.0, complete=False) == 2
    assert scaled(AtMost(Above(5.0), 9), 0.5).rank(found, 15.0, complete=False) == 1


def test_rounding_is_not_kept_for_any_energy() -> None:
    assert lost_for_energy(1.0).rank(squares(1, 1e-3, 1e-9), 1 + 1e-6, complete=True) == 2


@pytest.mark.parametrize("decay", [1.0, 0.7, 0.5])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_an_energy_is_kept_by_the_smallest_rank(decay: float, energy: float) -> None:
    values = np.arange(1.0, 451) ** -decay

    found = truncated_svd(turned(values, 500, 450), lost_for_energy(energy))

    best = smallest(values, energy)
    assert best <= len(found.s) <= best + best // 32
    assert found.energy >= energy * (1 - 1e-6)


@pytest.mark.parametrize("error", [0.5, 0.01, 1e-4])
def test_an_error_is_kept_down_to_the_rounding_of_float32(error: float) -> None:
    values = 0.97 ** np.arange(1.0, 451)

    found = truncated_svd(turned(values, 500, 450), lost_for_error(error))

    best = smallest(values, 1 - error**2)
    assert best <= len(found.s) <= best + best // 32
    assert found.error <= error * (1 + 1e-5)


@pytest.mark.parametrize("count", [3, 40])
def test_directions_above_white_noise_are_counted(count: int) -> None:
    m, n = 620, 560
    noise = torch.randn(m, n, generator=torch.Generator().manual_seed(6))
    edge = m**0.5 + n**0.5
    delta = noise + turned(edge * np.linspace(6.0, 2.0, count), m, n)

    found = truncated_svd(delta, Above(1.02 * edge))

    assert len(found.s) == int((torch.linalg.svdvals(delta.double()) > 1.02 * edge).sum())


def test_a_cap_ends_the_search() -> None:
    delta = turned(np.arange(1.0, 701) ** -0.3, 720, 700)

    found = truncated_svd(delta, AtMost(lost_for_energy(0.99), 12))

    assert len(found.s) == 12
    assert found.method == "krylov"


def test_equal_singular_values_do_not_pass_for_all_there_are() -> None:
    # A Krylov space of two different values is whole after two blocks, and holds few of each.
    values = np.where(np.arange(600) < 75, 1.0, 0.5)

    found = truncated_svd(turned(values, 620, 600), lost_for_energy(0.5))

    assert len(found.s) == smallest(values, 0.5)


def test_values_beyond_the_rank_are_lower_bounds() -> None:
    values = np.arange(1.0, 451) ** -0.7
    delta = turned(values, 500, 450)

    some, every = truncated_svd(delta, 8), truncated_svd(delta, 8, exact=True)

    assert some.method == "krylov"
    assert len(some.values) >= 40
    np.testing.assert_array_less(some.values, values[: len(some.values)] * (1 + 1e-6))
    np.testing.assert_allclose(every.values, values, rtol=1e-5)


# On both sides of the size from which dense matrices are decomposed by blocks, and of none of them square.
SIZES = [(120, 90), (384, 390), (400, 410)]


@pytest.mark.parametrize(("m", "n"), SIZES)
@pytest.mark.parametrize("second", [1e-3, 1e-6, 1e-9])
def test_all_of_a_dense_delta_is_the_same_rank_at_every_size(m: int, n: int, second: float) -> None:
    generator = torch.Generator().manual_seed(7)
    u, v = (torch.linalg.qr(torch.randn(k, 2, generator=generator, dtype=torch.float64)).Q for k in (m, n))
    delta = (u * torch.tensor([1.0, second], dtype=torch.float64)) @ v.T
    values = np.linalg.svd(delta.numpy(), compute_uv=False)
    wanted = int((values > max(m, n) * np.finfo(np.float64).eps * values[0]).sum())
    assert wanted == 2

    for limit in (Limit(energy=1.0), Limit(error=0.0)):
        found = reduced(delta, limit, "m", "F64", unchanged=None, unchanged_dtype=None)
        assert found.stored.update.rank == wanted


@pytest.mark.parametrize(("m", "n"), SIZES)
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_an_energy_is_the_rank_of_float64_singular_values_at_every_size(m: int, n: int, energy: float) -> None:
    delta = turned(0.8 ** np.arange(min(m, n)), m, n).double()
    wanted = smallest(np.linalg.svd(delta.numpy(), compute_uv=False), energy)

    found = reduced(delta, Limit(energy=energy), "m", "F64", unchanged=None, unchanged_dtype=None)

    assert found.stored.update.rank == wanted
    assert len(truncated_svd(delta.float(), lost_for_energy(energy)).s) == wanted


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_the_noise_of_stored_factors_is_bounded_and_tells_their_rank(kind: torch.dtype) -> None:
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}[kind]
    generator = torch.Generator().manual_seed(8)
    b, a = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((1280, 5), (5, 2048)))
    # A scale between the terms, which the product does not see, and a term that depends on two others.
    b[:, 4] = b[:, 0] - b[:, 1]
    b, a = b * 10.0 ** torch.arange(5), a * 10.0 ** -torch.arange(5)[:, None]
    stored = Factors(b.to(kind), a.to(kind))
    error = stored.b.double().numpy() @ stored.a.double().numpy() - b.numpy() @ a.numpy()

    noise = noise_of_factors(stored, unit)

    assert np.linalg.norm(error, 2) <= noise
    assert int((singular_values(stored) > noise).sum()) == 4
    assert noise_of_factors(Factors(torch.zeros(7, 2), torch.ones(2, 9)), unit) == 0.0
