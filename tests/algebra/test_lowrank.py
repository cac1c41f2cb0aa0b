"""The core identity against dense float64 arithmetic. Sizes all differ, so that a transposed factor cannot pass."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.algebra import lowrank, rank_rules
from loratools.algebra.lowrank import Factors

OUT, IN, RANK = 10, 23, 4
# A few dozen operations on numbers of size one: 1e-13 is about 500 float64 roundings.
TIGHT = 1e-13


def factors(seed, out=OUT, rank=RANK, in_=IN, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    b = torch.randn(out, rank, generator=g, dtype=torch.float64)
    a = torch.randn(rank, in_, generator=g, dtype=torch.float64)
    return Factors(b.to(dtype), a.to(dtype))


def dense(f):
    return f.b.double().numpy() @ f.a.double().numpy()


def relative(x, y):
    return np.linalg.norm(np.asarray(x) - np.asarray(y)) / np.linalg.norm(np.asarray(y))


# rank 4 of 10 takes the core; 7 of 10 and 12 of 10 take the dense product
SHAPES = [(10, 4, 23), (23, 4, 10), (10, 7, 23), (10, 12, 23), (1, 3, 8), (9, 2, 1), (10, 5, 23)]


def test_factors_name_their_sizes():
    f = factors(0)

    assert (f.out_features, f.rank, f.in_features) == (OUT, RANK, IN)


def test_factors_that_do_not_multiply_are_refused():
    with pytest.raises(ValueError, match=r"\(10, 4\) and a \(5, 23\)"):
        Factors(torch.zeros(10, 4), torch.zeros(5, 23))
    with pytest.raises(ValueError):
        Factors(torch.zeros(4), torch.zeros(4, 3))


def test_concatenate_sums_weighted_deltas_and_adds_ranks():
    f, g = factors(1), factors(2, rank=3, dtype=torch.bfloat16)

    joined = lowrank.concatenate([(0.5, f), (-2.0, g)])

    assert joined.rank == 7
    assert joined.b.dtype == joined.a.dtype == torch.float64
    assert relative(dense(joined), 0.5 * dense(f) - 2.0 * dense(g)) < TIGHT
    # The weight goes into b alone: factors of a are the same numbers.
    assert torch.equal(joined.a[:4], f.a)
    assert torch.equal(joined.b[:, :4], 0.5 * f.b)


def test_concatenate_refuses_nothing_and_different_shapes():
    with pytest.raises(ValueError, match="nothing"):
        lowrank.concatenate([])
    with pytest.raises(ValueError, match="different shapes"):
        lowrank.concatenate([(1.0, factors(0)), (1.0, factors(0, out=11))])


@pytest.mark.parametrize(("out", "rank", "in_"), SHAPES)
def test_svd_equals_the_dense_one(out, rank, in_):
    f = factors(3, out, rank, in_)

    found = lowrank.svd(f)

    k = min(out, rank, in_)
    assert (found.u.shape, found.s.shape, found.vt.shape) == ((out, k), (k,), (k, in_))
    np.testing.assert_allclose(found.s, np.linalg.svd(dense(f), compute_uv=False)[:k], rtol=0, atol=TIGHT * found.s[0])
    assert relative((found.u * found.s) @ found.vt, dense(f)) < TIGHT
    np.testing.assert_allclose(found.u.T @ found.u, np.eye(k), atol=TIGHT)
    np.testing.assert_allclose(found.vt @ found.vt.T, np.eye(k), atol=TIGHT)
    assert found.u.dtype == found.s.dtype == found.vt.dtype == torch.float64


@pytest.mark.parametrize(("out", "rank", "in_"), SHAPES)
def test_singular_values_and_norm_equal_the_dense_ones(out, rank, in_):
    f = factors(4, out, rank, in_)
    expected = np.linalg.svd(dense(f), compute_uv=False)

    np.testing.assert_allclose(
        lowrank.singular_values(f), expected[: min(out, rank, in_)], rtol=0, atol=TIGHT * expected[0]
    )
    assert lowrank.norm(f) == pytest.approx(np.linalg.norm(dense(f)), rel=TIGHT)


def test_svd_makes_the_largest_entry_of_every_left_vector_positive():
    for seed in range(5):
        u = lowrank.svd(factors(seed)).u
        assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


def test_sign_of_a_tie_is_decided_by_the_first_entry():
    u = torch.tensor([[-0.6, 0.6], [0.6, -0.6], [0.0, 0.0]])
    vt = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])

    fixed_u, _, fixed_vt = lowrank.fix_signs(u, torch.ones(2), vt)

    assert torch.equal(fixed_u, torch.tensor([[0.6, 0.6], [-0.6, -0.6], [0.0, 0.0]]))
    assert torch.equal(fixed_vt, torch.tensor([[-1.0, -2.0, -3.0, -4.0], [5.0, 6.0, 7.0, 8.0]]))


def test_svd_of_untrained_factors_is_zero_with_orthonormal_vectors():
    f = Factors(torch.zeros(OUT, RANK), torch.randn(RANK, IN, generator=torch.Generator().manual_seed(0)))

    found = lowrank.svd(f)

    assert torch.equal(found.s, torch.zeros(RANK, dtype=torch.float64))
    np.testing.assert_allclose(found.u.T @ found.u, np.eye(RANK), atol=TIGHT)
    np.testing.assert_allclose(found.vt @ found.vt.T, np.eye(RANK), atol=TIGHT)
    assert lowrank.norm(f) == 0
    assert lowrank.singular_values(f).tolist() == [0.0] * RANK


def test_rank_zero_factors_are_a_zero_delta():
    f = Factors(torch.zeros(OUT, 0), torch.zeros(0, IN))

    assert lowrank.svd(f).s.shape == (0,)
    assert lowrank.norm(f) == 0
    assert lowrank.inner(f, factors(0)) == 0


def test_one_term_of_two_zero_halves_does_not_spoil_the_rest():
    f = factors(5)
    f.b[:, 1] = 0
    f.a[2] = 0

    assert relative((lowrank.svd(f).u * lowrank.svd(f).s) @ lowrank.svd(f).vt, dense(f)) < TIGHT


def test_badly_graded_factors_keep_every_singular_value():
    # Column norms of b fall by 2^-24 a term while rows of a grow as fast: all four terms matter equally.
    f = factors(6, dtype=torch.float32)
    grade = 2.0 ** (24 * torch.arange(RANK))
    lopsided = Factors(f.b / grade, f.a * grade[:, None])

    np.testing.assert_allclose(lowrank.singular_values(lopsided), lowrank.singular_values(f), rtol=TIGHT)
    np.testing.assert_allclose(lowrank.svd(lopsided).s, lowrank.svd(f).s, rtol=TIGHT)
    assert lowrank.norm(lopsided) == pytest.approx(lowrank.norm(f), rel=TIGHT)


def test_products_that_overflow_float16_do_not():
    half = factors(6, dtype=torch.float16)
    large = Factors(half.b * 2**13, half.a * 2**13)

    assert lowrank.norm(large) == pytest.approx(np.linalg.norm(dense(half)) * 2**26, rel=TIGHT)
    assert float(lowrank.svd(large).s[0]) == pytest.approx(np.linalg.norm(dense(half), 2) * 2**26, rel=TIGHT)


def test_norm_of_a_difference_of_equals_is_at_rounding_level():
    f = factors(7)

    # Grams would leave 1e-8 here.
    assert lowrank.norm(lowrank.concatenate([(1.0, f), (-1.0, f)])) < TIGHT * lowrank.norm(f)


def test_size_may_sit_on_one_side_alone():
    f, g = factors(11), factors(12)
    left = Factors(f.b * 1e-200, f.a * 1e200)
    right = Factors(g.b * 1e-200, g.a * 1e200)

    assert lowrank.inner(left, right) == pytest.approx(lowrank.inner(f, g), rel=TIGHT)
    assert lowrank.norm(left) == pytest.approx(lowrank.norm(f), rel=TIGHT)
    np.testing.assert_allclose(lowrank.svd(left).s, lowrank.svd(f).s, rtol=TIGHT)


def test_the_product_is_never_formed():
    # Formed, it would take 80 GB.
    f = factors(13, out=100_001, rank=2, in_=100_000)

    found = lowrank.svd(f)

    assert float(torch.linalg.vector_norm(found.s)) == pytest.approx(lowrank.norm(f), rel=TIGHT)
    assert lowrank.inner(f, f) == pytest.approx(lowrank.norm(f) ** 2, rel=TIGHT)
    assert lowrank.truncate(found, 1).b.shape == (100_001, 1)


def test_inner_equals_the_dense_inner_product():
    f, g = factors(8), factors(9, rank=3)

    assert lowrank.inner(f, g) == pytest.approx((dense(f) * dense(g)).sum(), rel=TIGHT)
    assert lowrank.inner(f, f) == pytest.approx(lowrank.norm(f) ** 2, rel=TIGHT)
    with pytest.raises(ValueError, match="shapes differ"):
        lowrank.inner(f, factors(0, out=11))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_changing_the_gauge_changes_nothing(seed, rank):
    f = factors(seed, rank=rank)
    g = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(rank, rank, generator=g, dtype=torch.float64)).Q
    mix = mix * torch.linspace(0.1, 10, rank, dtype=torch.float64)
    g = Factors(f.b @ mix, torch.linalg.solve(mix, f.a))

    first, second = lowrank.svd(f), lowrank.svd(g)

    # The condition of `mix` is 100; products of singular vectors are gauge-free even where singular values are close.
    np.testing.assert_allclose(first.s, second.s, rtol=0, atol=1e-11 * float(first.s[0]))
    assert relative((first.u * first.s) @ first.vt, (second.u * second.s) @ second.vt) < 1e-11
    other = factors(seed + 1)
    assert lowrank.inner(f, other) == pytest.approx(lowrank.inner(g, other), rel=1e-9, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(0, 8))
def test_truncation_is_the_nearest_of_its_rank(seed, rank, kept):
    f = factors(seed, rank=rank)
    spectrum = np.linalg.svd(dense(f), compute_uv=False)

    cut = lowrank.truncate(lowrank.svd(f), kept)

    # Eckart and Young: the error of the nearest one is the norm of the singular values left out.
    assert cut.rank == min(kept, rank)
    error = np.linalg.norm(dense(f) - dense(cut))
    assert error == pytest.approx(np.linalg.norm(spectrum[kept:]), rel=1e-10, abs=1e-12 * spectrum[0])


def test_truncation_splits_singular_values_evenly_between_the_sides():
    found = lowrank.svd(factors(10))

    cut = lowrank.truncate(found, 3)

    root = found.s[:3].sqrt()
    np.testing.assert_allclose(torch.linalg.vector_norm(cut.b, dim=0), root, rtol=TIGHT)
    np.testing.assert_allclose(torch.linalg.vector_norm(cut.a, dim=1), root, rtol=TIGHT)
    with pytest.raises(ValueError, match="negative"):
        lowrank.truncate(found, -1)


def test_rank_for_energy_takes_a_share_that_is_met_exactly():
    s = torch.tensor([3.0, 1.0])

    assert rank_rules.rank_for_energy(s, 0.9) == 1
    assert rank_rules.rank_for_energy(s, 0.9000001) == 2
    assert rank_rules.rank_for_energy(s, 0.0) == 1


def test_rank_for_error_counts_the_tail():
    s = torch.tensor([3.0, 1.0])

    assert rank_rules.rank_for_error(s, 0.1**0.5) == 1
    assert rank_rules.rank_for_error(s, 0.3162) == 2
    assert rank_rules.rank_for_error(s, 1.0) == 0
    # 1 - 1e-24 is 1 in floating point; only tails summed from the small end see it.
    assert rank_rules.rank_for_error(torch.tensor([1.0, 1e-12], dtype=torch.float64), 1e-13) == 2
    assert rank_rules.rank_for_error(torch.tensor([1.0, 1e-12], dtype=torch.float64), 1e-11) == 1


def test_a_full_share_and_no_error_mean_the_numerical_rank():
    # 1e-15 is above 3 eps and below 10 eps.
    s = torch.tensor([1.0, 1e-9, 1e-15], dtype=torch.float64)

    assert rank_rules.rank_for_energy(s, 1.0) == rank_rules.rank_for_error(s, 0.0) == 3
    assert rank_rules.rank_for_energy(s, 1.0, shape=(10, 4)) == rank_rules.rank_for_error(s, 0.0, shape=(4, 10)) == 2


def test_ranks_of_a_zero_spectrum_are_zero():
    for s in (torch.zeros(3), torch.zeros(0)):
        assert rank_rules.rank_for_energy(s, 1.0) == rank_rules.rank_for_energy(s, 0.0) == 0
        assert rank_rules.rank_for_error(s, 0.0) == rank_rules.rank_for_error(s, 0.5) == 0
        assert lowrank.numerical_rank(s, (3, 4), 0.1) == 0


def test_numerical_rank_cuts_at_the_longer_side_times_eps_times_the_largest():
    s = torch.tensor([8.0, 1.01, 0.99, 0.0])

    assert lowrank.numerical_rank(s, (16, 2), 2**-7) == 2
    assert lowrank.numerical_rank(s, (2, 16), 2**-7) == 2
    assert lowrank.numerical_rank(s, (2, 2), 2**-7) == 3


def test_shares_and_errors_out_of_range_are_refused():
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError):
            rank_rules.rank_for_energy(torch.ones(2), share)
    for error in (-0.1, float("nan")):
        with pytest.raises(ValueError):
            rank_rules.rank_for_error(torch.ones(2), error)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8),
    st.floats(0.01, 0.999),
    st.sampled_from([1e-300, 1.0, 1e300]),
)
def test_rank_rules_equal_brute_force(values, share, scale):
    values = sorted(values, reverse=True)
    s = torch.tensor(values, dtype=torch.float64) * scale
    squares = [v * v for v in values]
    total = sum(squares)
    heads = [sum(squares[:k]) / total for k in range(len(values) + 1)]
    tails = [(sum(reversed(squares[k:])) / total) ** 0.5 for k in range(len(values) + 1)]
    error = (1 - share) ** 0.5

    found, found_error = rank_rules.rank_for_energy(s, share), rank_rules.rank_for_error(s, error)

    # Brute force in floating point may disagree only where a share is met to the last digits.
    assert heads[found] >= share - 1e-14
    assert found == 1 or heads[found - 1] < share + 1e-14
    assert tails[found_error] <= error * (1 + 1e-14)
    assert found_error == 0 or tails[found_error - 1] > error * (1 - 1e-14)
