"""Methods that work entry by entry: in full space against their definition on dense matrices, written out here, and
against mergekit's arithmetic; in core and knots space against the same definitions on their own coordinates, made by
dense singular value decompositions."""

from __future__ import annotations

import method_terms as make
import peers
import pytest
import torch
from torch import Tensor

from loratools.methods import Terms

mergekit_ties = peers.load("mergekit.merge_methods.generalized_task_arithmetic")
mergekit_sce = peers.load("mergekit.merge_methods.sce")
mergekit_magnitude = peers.load("mergekit.sparsify").magnitude
magnitude_outliers = peers.load("mergekit.sparsify").magnitude_outliers

WEIGHTS = (0.5, 1.25, -0.75)


def _terms(seed: int = 0) -> Terms:
    return make.make_terms((2, 3, 4), seed=seed, weights=WEIGHTS)


def _trimmed(x: Tensor, density: float) -> Tensor:
    count = max(1, int(density * x.numel()))
    return x * (x.abs() >= x.abs().flatten().sort(descending=True).values[count - 1])


def _ties(stack: list[Tensor], density: float, average: str = "count") -> Tensor:
    kept = torch.stack([_trimmed(x, density) for x in stack])
    sign = kept.sum(dim=0).sign()
    total, count = torch.zeros_like(stack[0]), torch.zeros_like(stack[0])
    for x, weight in zip(kept, WEIGHTS, strict=False):
        agree = (x.sign() == sign) & (x != 0)
        total += torch.where(agree, x, 0.0)
        count += torch.where(agree, 1.0 if average == "count" else weight, 0.0)
    return total / torch.where(count == 0, 1.0, count)


def _same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
@pytest.mark.parametrize("average", ["count", "weights"])
def test_ties_in_full_space_is_its_definition(density: float, average: str) -> None:
    terms = _terms()

    found = make.run("ties", terms, density=density, average=average)

    _same(found, _ties(make.deltas(terms), density, average))


@peers.needs("mergekit")
@pytest.mark.parametrize("majority", ["sum", "count"])
def test_ties_is_mergekits(majority: str) -> None:
    terms = _terms()
    stack = make.deltas(terms)
    kept = torch.stack([mergekit_magnitude(x, 0.3) for x in stack])
    mask = mergekit_ties.get_mask(kept, method=majority)  # type: ignore[arg-type]
    weights = torch.tensor(WEIGHTS, dtype=torch.float64).view(-1, 1, 1)
    divisor = (weights * mask).sum(dim=0)
    divisor[divisor == 0] = 1
    wanted = (kept * mask).sum(dim=0) / divisor

    found = make.run("ties", terms, density=0.3, majority=majority, average="weights")

    # mergekit gives an entry in which the signs are evenly split to the positive ones; here it has no sign.
    votes = kept.sum(dim=0) if majority == "sum" else kept.sign().sum(dim=0)
    assert float((votes != 0).double().mean()) > 0.4
    _same(found[votes != 0], wanted[votes != 0])
    assert not found[votes == 0].any()


@peers.needs("mergekit")
def test_magnitude_and_breadcrumbs_are_mergekits() -> None:
    terms = _terms()
    stack = make.deltas(terms)

    _same(make.run("magnitude", terms, density=0.4), sum(mergekit_magnitude(x, 0.4) for x in stack))  # type: ignore
    for density, outliers in ((0.6, 0.1), (0.95, 0.2), (0.9, 0.0)):
        wanted = sum(magnitude_outliers(x, density, gamma=outliers) for x in stack)
        found = make.run("breadcrumbs", terms, density=density, outliers=outliers)
        _same(found, wanted)  # type: ignore[arg-type]


@peers.needs("mergekit")
def test_sce_is_mergekits() -> None:
    terms = _terms()
    stack = torch.stack(make.deltas(terms))
    for density in (0.1, 0.5, 1.0):
        tasks = stack * mergekit_sce.sce_mask(stack, density)
        mask = mergekit_ties.get_mask(tasks, method="sum")
        weights = mergekit_sce.sce_weight(tasks).view(-1, 1, 1) * mask
        wanted = (tasks * weights).sum(dim=0) / weights.sum(dim=0).clamp(min=1e-6)

        _same(make.run("sce", terms, density=density), wanted)


def _core(terms: Terms) -> tuple[Tensor, list[Tensor], Tensor]:
    """Left singular vectors of the deltas side by side, right ones of the deltas above one another, and the cores."""
    stack = make.deltas(terms)
    rank = sum(f.rank for f in terms.factors)
    u = torch.linalg.svd(torch.cat(stack, dim=1)).U[:, :rank]
    v = torch.linalg.svd(torch.cat(stack, dim=0)).Vh[:rank].mT
    return u, [u.mT @ x @ v for x in stack], v


@pytest.mark.parametrize("density", [0.2, 0.7])
def test_ties_in_core_space_is_its_definition_on_singular_vectors_of_all_deltas(density: float) -> None:
    terms = _terms()
    u, cores, v = _core(terms)

    _same(make.run("ties", terms, density=density, space="core"), u @ _ties(cores, density) @ v.mT)


@pytest.mark.parametrize("density", [0.2, 0.7])
@pytest.mark.parametrize("name", ["ties", "knots"])
def test_knots_is_the_dense_method_of_the_paper(name: str, density: float) -> None:
    terms = _terms()
    rank = sum(f.rank for f in terms.factors)
    u, s, vt = torch.linalg.svd(torch.cat(make.deltas(terms), dim=1), full_matrices=False)
    parts = list(vt[:rank].split(make.IN, dim=1))

    found = make.run(name, terms, density=density, **({"space": "knots"} if name == "ties" else {}))

    _same(found, (u[:, :rank] * s[:rank]) @ _ties(parts, density))


def test_knots_of_the_sum_is_the_sum() -> None:
    terms = _terms()

    _same(make.run("knots", terms, join="linear", density=1.0), sum(make.deltas(terms)))  # type: ignore[arg-type]


def test_dare_keeps_entries_whole_or_not_at_all_and_is_the_sum_on_average() -> None:
    terms = make.make_terms((3,), shape=(40, 30))
    delta = make.deltas(terms)[0]

    found = make.run("dare", terms, density=0.3)

    kept = found != 0
    _same(found[kept], delta[kept] / 0.3)
    # 1,200 draws: five standard deviations are 0.066.
    assert float(kept.double().mean()) == pytest.approx(0.3, abs=0.066)


def test_dare_ties_elects_among_what_was_kept() -> None:
    terms = make.make_terms((2, 3), weights=(0.5, 1.5))
    alone = [
        Terms(terms.name, (f,), (w,), (s,)) for f, w, s in zip(terms.factors, terms.weights, terms.scales, strict=True)
    ]
    first = make.run("dare", alone[0], density=0.6)
    # The first adapter's mask is that of the first adapter of both; what it leaves of the other is found from the sum.
    second = make.run("dare", terms, density=0.6) - first
    _same(second[second.abs() > 1e-9], (make.deltas(terms)[1] / 0.6)[second.abs() > 1e-9])

    found = make.run("dare", terms, density=0.6, join="ties")

    second = torch.where(second.abs() > 1e-9, second, 0.0)
    _same(found, _ties([first, second], 1.0))


def test_della_keeps_larger_entries_of_a_row_more_often_and_divides_by_the_probability() -> None:
    terms = make.make_terms((4,), shape=(3000, 5))
    delta = make.deltas(terms)[0]
    ranks = delta.abs().argsort(dim=1).argsort(dim=1)

    found = make.run("della", terms, density=0.5, spread=0.2, join="linear")

    for rank, probability in enumerate((0.3, 0.4, 0.5, 0.6, 0.7)):
        here = ranks == rank
        kept = found[here] != 0
        _same(found[here][kept], delta[here][kept] / probability)
        # 3,000 draws: five standard deviations are below 0.046.
        assert float(kept.double().mean()) == pytest.approx(probability, abs=0.046)


def test_entries_of_equal_size_at_the_threshold_are_all_kept() -> None:
    from loratools.algebra.sparsify import largest

    x = torch.tensor([[3.0, -2.0, 2.0], [1.0, 2.0, 0.0]], dtype=torch.float64)

    assert largest(lambda: [x[:1], x[1:]], 0.4)(x).tolist() == [[3.0, -2.0, 2.0], [0.0, 2.0, 0.0]]


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from loratools.methods.common import elementwise

    terms = _terms()
    whole = [make.run(name, terms) for name in ("ties", "sce", "breadcrumbs")]
    monkeypatch.setattr(elementwise, "_BLOCK", 3 * make.IN)

    for name, wanted in zip(("ties", "sce", "breadcrumbs"), whole, strict=True):
        _same(make.run(name, terms), wanted)
