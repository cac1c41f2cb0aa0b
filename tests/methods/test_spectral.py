"""Methods that work with singular vectors and inner products, against their definition on dense matrices."""

from __future__ import annotations

import math

import method_terms as make
import peers
import pytest
import torch
from torch import Tensor

from loratools.errors import UsageError
from loratools.methods import Terms

karcher_merge_tensors = peers.load("mergekit.merge_methods.karcher").karcher_merge_tensors
mergekit_slerp = peers.load("mergekit.merge_methods.slerp").slerp


def _same(found: Tensor, wanted: Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


def _sum(terms: Terms) -> Tensor:
    return torch.stack(make.deltas(terms)).sum(dim=0)


def test_linear_is_the_weighted_sum() -> None:
    terms = make.make_terms((2, 3), weights=(0.5, -2.0))

    _same(make.run("linear", terms), 0.5 * _own(terms, 0) - 2 * _own(terms, 1))


def _own(terms: Terms, i: int) -> Tensor:
    return terms.factors[i].b @ terms.factors[i].a


def test_linear_of_one_at_weight_one_is_the_very_same_object() -> None:
    from loratools.methods import linear

    terms = make.make_terms((2,))

    assert linear.combine(terms) is terms.factors[0]
    assert linear.combine(make.make_terms((2,), weights=(2.0,))) is not terms.factors[0]


@peers.needs("mergekit")
@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_slerp_is_mergekits(t: float) -> None:
    terms = make.make_terms((2, 3), weights=(1 - t, t))
    wanted = mergekit_slerp(torch.tensor([t], dtype=torch.float64), _own(terms, 0)[None], _own(terms, 1)[None])[0]

    _same(make.run("slerp", terms), wanted)
    _same(make.run("slerp", make.make_terms((2, 3), weights=(2 - 2 * t, 2 * t))), 2 * wanted)


def test_slerp_of_deltas_that_point_the_same_way_is_the_straight_line() -> None:
    terms = make.make_terms((2, 2), weights=(0.25, 0.75))
    one = terms.factors[0]
    alike = Terms("m", (one, type(one)(3 * one.b, one.a)), terms.weights, (1.0, 1.0))

    _same(make.run("slerp", alike), 2.5 * _own(terms, 0))


def test_slerp_is_between_two() -> None:
    with pytest.raises(UsageError, match="takes two adapters, and 3"):
        make.run("slerp", make.make_terms((2, 2, 2)))


@peers.needs("mergekit")
def test_karcher_is_mergekits_and_for_two_the_arc() -> None:
    terms = make.make_terms((2, 3, 4), weights=(0.5, 0.2, 0.3))
    wanted = karcher_merge_tensors([_own(terms, i) for i in range(3)], list(terms.weights), max_iter=200, tol=1e-13)
    pair = make.make_terms((2, 3), weights=(0.3, 0.7))
    one, two = (_own(pair, i) for i in (0, 1))
    t = torch.tensor([0.7], dtype=torch.float64)
    arc = mergekit_slerp(t, (one / one.norm())[None], (two / two.norm())[None])[0]

    _same(make.run("karcher", terms), wanted, 1e-9)
    _same(make.run("karcher", pair), (0.3 * one.norm() + 0.7 * two.norm()) * arc, 1e-9)


def test_karcher_of_opposite_deltas_has_no_direction() -> None:
    terms = make.make_terms((2,))
    one = terms.factors[0]

    with pytest.raises(UsageError, match="opposite"):
        make.run("karcher", Terms("m", (one, type(one)(-one.b, one.a)), (1.0, 1.0), (1.0, 1.0)))


@pytest.mark.parametrize("keep", [0, 2])
def test_tsv_is_the_papers_formula_on_dense_matrices(keep: int) -> None:
    terms = make.make_terms((2, 3, 4), weights=(1.0, 0.5, -2.0))
    us, ss, vs = [], [], []
    for x, f in zip(make.deltas(terms), terms.factors, strict=True):
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        rank = min(f.rank, keep or f.rank)
        us, ss, vs = [*us, u[:, :rank]], [*ss, s[:rank]], [*vs, vt[:rank]]

    def whitened(x: Tensor) -> Tensor:
        p, _, qt = torch.linalg.svd(x, full_matrices=False)
        return p @ qt

    wanted = whitened(torch.cat(us, dim=1)) @ torch.diag(torch.cat(ss)) @ whitened(torch.cat(vs, dim=0))

    _same(make.run("tsv", terms, keep=keep), wanted)


def test_tsv_of_an_adapter_and_its_copy_is_that_adapter() -> None:
    terms = make.make_terms((3,))
    twice = Terms("m", terms.factors * 2, (1.0, 1.0), (1.0, 1.0))

    _same(make.run("tsv", twice), _own(terms, 0))


def test_iso_c_is_the_papers_formula_over_the_support() -> None:
    terms = make.make_terms((2, 3), weights=(1.0, 0.5))
    u, s, vt = torch.linalg.svd(_sum(terms), full_matrices=False)

    _same(make.run("iso", terms), s[:5].mean() * u[:, :5] @ vt[:5])


def test_iso_cts_is_the_papers_formula() -> None:
    terms = make.make_terms((3, 3), weights=(1.0, 0.5))
    stack = make.deltas(terms)
    u, s, vt = torch.linalg.svd(_sum(terms), full_matrices=False)
    # Six directions: four common, and one from each task.
    common = 4
    us, ss, vs = [u[:, :common]], [s[:common]], [vt[:common]]
    for x in stack:
        ut, st, vtt = torch.linalg.svd(x - u[:, :common] @ u[:, :common].mT @ x, full_matrices=False)
        us, ss, vs = [*us, ut[:, :1]], [*ss, st[:1]], [*vs, vtt[:1]]
    p, _, qt = torch.linalg.svd(torch.cat(us, dim=1), full_matrices=False)
    x, _, yt = torch.linalg.svd(torch.cat(vs, dim=0), full_matrices=False)

    _same(make.run("iso", terms, common=0.67), torch.cat(ss).mean() * (p @ qt) @ (x @ yt))


def _wudi_loss(x: Tensor, stack: list[Tensor]) -> Tensor:
    return torch.stack([((x - t) @ t.mT).square().sum() / t.square().sum() for t in stack]).sum()


def test_wudi_solves_its_least_squares_on_dense_matrices() -> None:
    terms = make.make_terms((2, 3, 4), weights=(1.0, 0.5, 1.5))
    stack = make.deltas(terms)
    grams = [t.mT @ t / t.square().sum() for t in stack]
    gram = torch.stack(grams).sum(dim=0)
    mu = 0.01 * gram.trace() / 9  # nine directions are spanned
    wanted = (sum(t @ g for t, g in zip(stack, grams, strict=True)) + mu * _sum(terms)) @ torch.linalg.inv(
        gram + mu * torch.eye(make.IN, dtype=torch.float64)
    )

    _same(make.run("wudi", terms), wanted, 1e-9)


def test_wudi_beats_the_papers_descent_and_leaves_nobody_disturbed() -> None:
    terms = make.make_terms((2, 2, 3))
    stack = make.deltas(terms)
    x = _sum(terms).requires_grad_()
    optimiser = torch.optim.Adam([x], lr=1e-2)
    for _ in range(300):
        optimiser.zero_grad()
        _wudi_loss(x, stack).backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    found = make.run("wudi", terms, ridge=1e-9)

    assert float(_wudi_loss(found, stack)) < 1e-6 * float(_wudi_loss(x.detach(), stack))
    for t in stack:
        rows = torch.linalg.svd(t).Vh[: int(torch.linalg.matrix_rank(t))]
        assert float(((found - t) @ rows.mT).norm()) < 1e-6 * float(t.norm())


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_ctm_shares_its_subspaces_at_least_as_well_as_any_other_method(rank: int) -> None:
    terms = make.make_terms((2, 3, 4), weights=(1.0, 2.0, 0.5))
    stack = make.deltas(terms)
    units = [x / x.norm() for x in stack]

    found = make.run("ctm", terms, rank=rank)

    u, s, vt = torch.linalg.svd(found)
    assert int((s > 1e-9 * s[0]).sum()) == rank
    u, v = u[:, :rank], vt[:rank].mT
    _same(found, u @ u.mT @ _sum(terms) @ v @ v.mT)

    def captured(u: Tensor, v: Tensor) -> float:
        return math.fsum(float((u.mT @ x @ v).square().sum()) for x in units)

    total = torch.linalg.svd(_sum(terms))
    stacked = (torch.linalg.svd(torch.cat(units, dim=1)).U, torch.linalg.svd(torch.cat(units, dim=0)).Vh)
    assert captured(u, v) >= captured(total.U[:, :rank], total.Vh[:rank].mT) - 1e-12
    assert captured(u, v) >= captured(stacked[0][:, :rank], stacked[1][:rank].mT) - 1e-12
    # Stationary: each side is the best for the other.
    best = torch.linalg.eigvalsh(sum(x @ v @ v.mT @ x.mT for x in units))[-rank:].sum()  # type: ignore[union-attr]
    assert captured(u, v) == pytest.approx(float(best), rel=1e-6)


def test_fedex_is_the_product_of_means_and_its_residual_completes_it() -> None:
    from loratools.methods import fedex

    terms = make.make_terms((3, 3), weights=(0.5, 1.5))
    one, two = terms.factors
    wanted = 2 * (0.25 * one.b + 0.75 * two.b) @ (0.25 * one.a + 0.75 * two.a)

    _same(make.run("fedex", terms), wanted)
    _same(make.dense(fedex.approximates(terms)), _sum(terms))
