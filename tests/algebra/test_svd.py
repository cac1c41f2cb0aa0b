"""The certified randomised decomposition, on matrices whose singular values are known because they were put there."""

import math

import numpy as np
import pytest
import torch

from loratools.algebra import svd as module
from loratools.algebra.lowrank import truncate
from loratools.algebra.rank_rules import Above, lost_for_energy
from loratools.algebra.svd import truncated_svd, truncated_svds

# float32 products of a few thousand terms: sums of squares are good to about 1e-7, with room.
SUMS = 1e-6


def reflector(size, g):
    v = torch.randn(size, 1, generator=g, dtype=torch.float64)
    return v / v.norm()


def matrix(spectrum, m, n, seed=0):
    """Return a float32 matrix with these singular values (to rounding), its vectors turned by two reflections."""
    g = torch.Generator().manual_seed(seed)
    d = torch.zeros(m, n, dtype=torch.float64)
    d.diagonal()[: len(spectrum)] = torch.as_tensor(spectrum, dtype=torch.float64)
    left, right = reflector(m, g), reflector(n, g)
    d = d - 2 * left @ (left.T @ d)
    return (d - 2 * (d @ right) @ right.T).float()


def noise_spectrum(n):
    """Return the singular values of a white square matrix of unit edge: quantiles of the quarter-circle law."""
    x = np.linspace(0, 1, 20001)
    distribution = 2 / np.pi * (x * np.sqrt(1 - x * x) + np.arcsin(x))
    return np.interp((np.arange(n, 0, -1) - 0.5) / n, distribution, x)


def spikes(n, count, height, power):
    """Return `count` falling directions above the unit edge of white noise."""
    top = 1 + height * np.arange(1, count + 1) ** -power
    return np.concatenate([top, noise_spectrum(n)[count:]])


def index(n):
    return np.arange(1.0, n + 1)


SPECTRA = {
    "fast": lambda n: 0.9 ** index(n),
    "slow": lambda n: 0.99 ** index(n),
    "i^-1": lambda n: index(n) ** -1.0,
    "i^-0.7": lambda n: index(n) ** -0.7,
    "i^-0.5": lambda n: index(n) ** -0.5,
    "i^-0.3": lambda n: index(n) ** -0.3,
    "white": noise_spectrum,
    "64 over white": lambda n: spikes(n, 64, 3, 0.5),
    "64 far over white": lambda n: spikes(n, 64, 30, 1.0),
    "8 high equal over white": lambda n: spikes(n, 8, 30, 0.0),
    "2 very high over white": lambda n: spikes(n, 2, 80, 0.7),
    "two steps": lambda n: np.where(index(n) <= n // 8, 1.0, 0.5),
    "1 over all": lambda n: np.where(index(n) == 1, 1e6, index(n) ** -0.5),
}


def best_share(spectrum, rank):
    return (spectrum[:rank] ** 2).sum() / (spectrum**2).sum()


def residual(delta, found):
    product = (found.u.double() * found.s) @ found.vt.double()
    return float((delta.double() - product).norm() / delta.double().norm())


def assert_well_formed(found, m, n, k):
    assert (found.u.shape, found.s.shape, found.vt.shape) == ((m, k), (k,), (k, n))
    # Rounding to float32 leaves inner products of unit vectors accurate to a few 6e-8.
    np.testing.assert_allclose(found.u.double().T @ found.u.double(), np.eye(k), atol=1e-6)
    np.testing.assert_allclose(found.vt.double() @ found.vt.double().T, np.eye(k), atol=1e-6)
    assert (found.s[:-1] >= found.s[1:]).all()
    assert (found.s >= 0).all()
    assert (found.u.gather(0, found.u.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("m", "n", "rank"), [(256, 300, 4), (700, 600, 16), (1024, 1100, 64), (2048, 2000, 8)])
def test_default_tolerance_captures_all_but_a_ten_thousandth_of_the_optimum(spectrum, m, n, rank):
    values = SPECTRA[spectrum](min(m, n))
    delta = matrix(values, m, n)

    found = truncated_svd(delta, rank)

    optimum = best_share(values, rank)
    assert found.energy >= 0.9999 * optimum
    assert found.energy <= optimum + SUMS
    assert optimum - found.energy <= found.gap_bound + SUMS
    assert found.energy + found.gap_bound <= 1 + SUMS
    assert found.gap_estimate <= found.gap_bound + SUMS
    assert found.error == pytest.approx(residual(delta, found), rel=1e-4)
    assert_well_formed(found, m, n, rank)


@pytest.mark.parametrize(("m", "n"), [(1408, 512), (512, 1408), (600, 600)])
def test_white_noise_over_64_directions_stored_in_bfloat16_is_captured(m, n):
    g = torch.Generator().manual_seed(1)
    u = torch.linalg.qr(torch.randn(m, 64, generator=g)).Q
    v = torch.linalg.qr(torch.randn(n, 64, generator=g)).Q
    heights = 3 * (m**0.5 + n**0.5) * torch.arange(1, 65) ** -0.5
    delta = (1e-3 * ((u * heights) @ v.T + torch.randn(m, n, generator=g))).bfloat16().float()
    spectrum = torch.linalg.svdvals(delta.double()).numpy()

    found = truncated_svd(delta, 16)

    assert found.method == "krylov"
    assert best_share(spectrum, 16) * 0.9999 <= found.energy <= best_share(spectrum, 16) + SUMS
    assert found.norm == pytest.approx(np.linalg.norm(spectrum), rel=1e-12)
    assert found.error == pytest.approx(residual(delta, found), rel=1e-5)
    np.testing.assert_array_less(found.s, spectrum[:16] * (1 + SUMS))


@pytest.mark.parametrize("rank", [3, 16, 40])
def test_exact_equals_lapack(rank):
    g = torch.Generator().manual_seed(2)
    delta = torch.randn(90, 40, generator=g)
    u, s, vt = np.linalg.svd(delta.double().numpy(), full_matrices=False)

    for found, wanted in ((truncated_svd(delta, rank, exact=True), delta), (truncated_svd(delta.T, rank), delta.T)):
        assert found.method == "gram"
        assert (found.gap_bound, found.gap_estimate) == (0, 0)
        np.testing.assert_allclose(found.s, s[:rank], rtol=1e-12)
        assert_well_formed(found, *wanted.shape, rank)
        product = (u[:, :rank] * s[:rank]) @ vt[:rank]
        product = product if wanted is delta else product.T
        # float32 vectors: 6e-8 in each entry, relative to the product as a whole
        assert np.linalg.norm((found.u * found.s).numpy() @ found.vt.numpy() - product) < 1e-6 * s[0]


def test_exact_is_exact_where_randomised_would_do():
    values = SPECTRA["i^-0.5"](400)
    delta = matrix(values, 500, 400)

    found = truncated_svd(delta, 5, exact=True)

    assert truncated_svd(delta, 5).method == "krylov"
    assert found.method == "gram"
    np.testing.assert_allclose(found.s, values[:5], rtol=SUMS)


def test_exact_keeps_singular_values_that_a_gram_would_lose():
    delta = torch.diag(torch.tensor([1.0, 1e-5, 1e-12]))

    found = truncated_svd(delta, 3, exact=True)

    assert found.method == "dense"
    np.testing.assert_allclose(found.s, delta.diagonal().double(), rtol=1e-14)


@pytest.mark.parametrize(("m", "n"), [(700, 600), (60, 50)])
def test_error_of_a_delta_of_low_rank_is_measured_not_cancelled(m, n):
    # What is left is float32 rounding of the factors, around 1e-7: the identity of squares could not tell it from 3e-4.
    delta = matrix([3.0, 2.0, 1.0], m, n)

    found = truncated_svd(delta, 5)

    assert found.error < 1e-6
    assert found.error == pytest.approx(residual(delta, found), rel=1e-6)
    assert found.energy == pytest.approx(1, abs=SUMS)
    np.testing.assert_allclose(found.s[:3], [3, 2, 1], rtol=SUMS)
    np.testing.assert_allclose(found.s[3:], 0, atol=SUMS)
    assert_well_formed(found, m, n, 5)


@pytest.mark.parametrize(("m", "n", "method"), [(700, 600, "krylov"), (60, 50, "gram")])
@pytest.mark.parametrize("known", [1, 10])
def test_rank_deficient_delta_gives_as_many_vectors_as_asked_for(m, n, method, known):
    delta = matrix(1.0 / index(known), m, n)

    found = truncated_svd(delta, 24)

    # After one direction is found, only rounding is left of a delta of rank 1: whether the iteration gives up on it and
    # leaves it to the exact method depends on the order in which this machine's BLAS adds up.
    assert found.method in ({method, "gram"} if known == 1 else {method})
    assert_well_formed(found, m, n, 24)
    np.testing.assert_allclose(found.s, np.concatenate([1.0 / index(known), np.zeros(24 - known)]), atol=SUMS)
    assert found.gap_estimate == 0


def test_zero_is_captured_whole_by_orthonormal_vectors():
    found = truncated_svd(torch.zeros(7, 5), 3)

    assert (found.norm, found.energy, found.error, found.method) == (0, 1, 0, "zero")
    assert_well_formed(found, 7, 5, 3)


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (900, 1)])
def test_a_single_row_or_column_is_its_norm(shape):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(3))

    found = truncated_svd(delta, 4)

    assert_well_formed(found, *shape, 1)
    assert float(found.s) == pytest.approx(float(delta.double().norm()), rel=1e-14)
    assert found.error < 1e-6


def test_rank_is_cut_to_the_shorter_side():
    delta = torch.randn(6, 10, generator=torch.Generator().manual_seed(4))

    found = truncated_svd(delta, 99)

    assert_well_formed(found, 6, 10, 6)
    assert found.error < 1e-6


@pytest.mark.parametrize("exponent", [-120, -60, 60, 110])
@pytest.mark.parametrize(("m", "n"), [(320, 400), (30, 20)])
def test_tiny_and_huge_values_are_as_good_as_others(m, n, exponent):
    delta = matrix(SPECTRA["i^-0.7"](min(m, n)), m, n)
    # A power of two, so that both have the same digits; at 2^-120 the smallest entries would be subnormal.
    delta = torch.where(delta.abs() < 2.0**-6, 0.0, delta)
    scaled = delta * 2.0**exponent

    plain, found = truncated_svd(delta, 4), truncated_svd(scaled, 4)

    np.testing.assert_allclose(found.s, plain.s * 2.0**exponent, rtol=SUMS)
    assert found.energy == pytest.approx(plain.energy, rel=SUMS)
    assert found.error == pytest.approx(plain.error, rel=SUMS)
    assert found.norm == pytest.approx(plain.norm * 2.0**exponent, rel=1e-14)


def test_singular_values_beyond_float32_are_finite():
    found = truncated_svd(torch.full((400, 320), 3e38), 2)

    assert float(found.s[0]) == pytest.approx(3e38 * math.sqrt(400 * 320), rel=SUMS)


def test_subnormal_values_are_seen():
    delta = torch.full((400, 320), 1e-44)

    found = truncated_svd(delta, 2)

    assert float(found.s[0]) == pytest.approx(float(delta[0, 0].double()) * math.sqrt(400 * 320), rel=SUMS)


def test_huge_dynamic_range_keeps_the_large_and_is_not_upset_by_the_small():
    values = 10.0 ** -index(600)
    delta = matrix(values, 700, 600)

    found = truncated_svd(delta, 16)

    # Below 1e-7 of the largest, float32 storage of delta itself has made up the values.
    np.testing.assert_allclose(found.s[:4], values[:4], rtol=1e-3)
    assert_well_formed(found, 700, 600, 16)
    # Directions below 1e-6 of the largest are not searched for: 1e-12 of the energy.
    assert found.error < 3e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad):
    delta = torch.ones(5, 7)
    delta[3, 2] = bad

    with pytest.raises(ValueError, match="NaN or infinity"):
        truncated_svd(delta, 2)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="3 axes"):
        truncated_svd(torch.ones(2, 2, 2), 1)
    with pytest.raises(ValueError, match="rank 0"):
        truncated_svd(torch.ones(2, 2), 0)


def test_same_seed_gives_the_same_bytes_and_the_global_generator_is_left_alone():
    delta = matrix(SPECTRA["i^-0.3"](400), 500, 400)
    torch.manual_seed(1)
    state = torch.get_rng_state()

    first = truncated_svd(delta, 8, seed=3)
    again = truncated_svd(delta.clone(), 8, seed=3)
    other = truncated_svd(delta, 8, seed=4)

    for name in ("u", "s", "vt"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.u, other.u)
    assert first.energy == pytest.approx(other.energy, rel=1e-4)
    assert torch.equal(torch.get_rng_state(), state)


def test_layout_in_memory_and_dtype_do_not_matter():
    delta = matrix(SPECTRA["i^-0.7"](400), 450, 400).bfloat16()

    plain = truncated_svd(delta.float(), 8)

    transposed = truncated_svd(delta.float().T.contiguous().T, 8)
    np.testing.assert_allclose(transposed.s, plain.s, rtol=SUMS)
    np.testing.assert_allclose(truncated_svd(delta, 8).s, plain.s, rtol=SUMS)
    np.testing.assert_allclose(truncated_svd(delta.double(), 8).s, plain.s, rtol=SUMS)


def test_input_is_left_alone():
    delta = matrix(SPECTRA["i^-0.7"](400), 450, 400) * 1e-20
    before = delta.clone()

    truncated_svd(delta, 8)

    assert torch.equal(delta, before)


def test_a_smaller_tolerance_buys_energy_and_costs_passes():
    values = SPECTRA["white"](900)
    delta = matrix(values, 1000, 900)
    gaps, passes = [], []
    for tolerance in (1e-2, 1e-4, 1e-6):
        found = truncated_svd(delta, 8, tolerance=tolerance)
        gaps.append(1 - found.energy / best_share(values, 8))
        passes.append(found.passes)

    assert passes == sorted(set(passes))
    assert gaps == sorted(gaps, reverse=True)
    # The estimate is one, not a bound: measured, it was at most 1.7 times too small.
    assert all(gap < 2 * tolerance for gap, tolerance in zip(gaps, (1e-2, 1e-4, 1e-6), strict=True))


def test_a_basis_that_grows_too_large_gives_way_to_the_exact_method():
    values = SPECTRA["white"](340)
    delta = matrix(values, 400, 340)

    found = truncated_svd(delta, 16, tolerance=1e-15)

    assert truncated_svd(delta, 16, tolerance=1e-2).method == "krylov"
    assert found.method == "gram"
    np.testing.assert_allclose(found.s, values[:16], rtol=SUMS)


def test_gap_bound_is_all_the_energy_outside_of_the_space_searched():
    delta = matrix(SPECTRA["i^-0.5"](600), 700, 600)

    found = truncated_svd(delta, 8)

    # 48 columns or more were kept. At the optimum, the 40 beyond the 8 returned hold 0.25 of the energy, of 0.61.
    assert 0.3 < found.gap_bound < 0.5
    assert found.gap_bound < 1 - found.energy - 0.15


PLATEAUS = {
    "100 equal": lambda n: np.where(index(n) <= 100, 1.0, 0.1 * index(n) ** -0.5),
    "100 nearly equal": lambda n: np.where(index(n) <= 100, 1 + 1e-4 * index(n)[::-1] / n, 0.5 * index(n) ** -0.2),
    "two steps": SPECTRA["two steps"],
    "all equal": lambda n: np.ones(n),
}


@pytest.mark.parametrize("spectrum", PLATEAUS)
@pytest.mark.parametrize("rank", [72, 128])
def test_more_equal_singular_values_than_a_block_has_columns_are_found(spectrum, rank):
    values = PLATEAUS[spectrum](768)

    found = truncated_svd(matrix(values, 800, 768), rank)

    assert found.method == "krylov"
    assert found.energy >= 0.9999 * best_share(values, rank)
    assert_well_formed(found, 800, 768, rank)


def test_convergence_of_the_large_does_not_hide_the_small():
    # One value has converged; the other still gains a tenth, as much as it gained before, so it will gain for long.
    history = [torch.tensor([50.0, 1.0]), torch.tensor([100.0, 1.1]), torch.tensor([100.0, 1.2])]

    assert module._extrapolated_gaps(history).tolist() == pytest.approx([0.0, 0.1 * 0.9 / 0.1], rel=1e-5)
    assert module._extrapolated_gaps(history[:2]).tolist() == [math.inf, math.inf]
    falling = [torch.tensor([1.0]), torch.tensor([1.4]), torch.tensor([1.6])]
    assert float(module._extrapolated_gaps(falling)) == pytest.approx(0.2, rel=1e-5)  # 0.2 (1/2 + 1/4 + ...)
    sudden = [torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([2.0 + 1e-3])]
    assert float(module._extrapolated_gaps(sudden)) == pytest.approx(1e-3 * 0.25, rel=1e-3)  # the ratio is kept at 0.2
    grown = [torch.tensor([2.0]), torch.tensor([3.0, 1.0]), torch.tensor([3.5, 1.5])]
    assert module._extrapolated_gaps(grown).tolist() == pytest.approx([0.5, 0.5], rel=1e-5)  # none is as good as zero


def test_result_truncates_to_balanced_factors():
    values = SPECTRA["i^-1"](300)
    delta = matrix(values, 350, 300)
    found = truncated_svd(delta, 6)

    factors = truncate(found, 4)

    np.testing.assert_allclose(torch.linalg.vector_norm(factors.b, dim=0), values[:4] ** 0.5, rtol=1e-4)
    np.testing.assert_allclose(torch.linalg.vector_norm(factors.a, dim=1), values[:4] ** 0.5, rtol=1e-4)
    error = float((delta - factors.b @ factors.a).norm() / delta.norm())
    assert error == pytest.approx(math.sqrt(1 - best_share(values, 4)), rel=1e-4)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (260, 250)])
@pytest.mark.parametrize("rank", [3, lost_for_energy(0.9), Above(2.0)])
def test_many_matrices_together_are_decomposed_as_one_by_one(shape, rank):
    g = torch.Generator().manual_seed(8)
    deltas = torch.randn(5, *shape, generator=g) * 10.0 ** torch.arange(-30, 20, 10).view(-1, 1, 1)
    deltas[2] = 0

    for found, delta in zip(truncated_svds(deltas, rank), deltas, strict=True):
        alone = truncated_svd(delta, rank)
        assert (found.method, len(found.s), found.u.shape) == (alone.method, len(alone.s), alone.u.shape)
        np.testing.assert_allclose(found.s, alone.s, rtol=1e-10)
        np.testing.assert_allclose(found.values, alone.values, rtol=1e-6)
        np.testing.assert_allclose(found.u, alone.u, atol=1e-5)
        np.testing.assert_allclose(found.vt, alone.vt, atol=1e-5)
        assert found.norm == pytest.approx(alone.norm, rel=1e-12)
        assert found.energy == pytest.approx(alone.energy, rel=1e-9)
        assert found.error == pytest.approx(alone.error, rel=1e-5, abs=1e-7)


def test_one_of_many_that_is_not_finite_is_refused():
    deltas = torch.randn(3, 9, 7)
    deltas[1, 2, 3] = torch.nan

    with pytest.raises(ValueError, match="NaN"):
        truncated_svds(deltas, 2)
