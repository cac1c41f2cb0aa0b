"""What every method of the registry promises, held over all of them and over all the coordinates they work in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import method_terms as make
import pytest
import torch
from torch import Tensor

from loratools import methods, registry
from loratools.algebra.lowrank import Factors
from loratools.errors import LoraToolsError
from loratools.methods import Laws, Option, Terms

CASES: list[tuple[str, dict[str, object]]] = []
for _name in registry.names("methods"):
    _options = {o.name: o for o in methods.options_of(_name)}
    _varied = [o for o in ("space", "join", "on", "common", "average") if o in _options]
    CASES.append((_name, {}))
    for _option in _varied:
        _values = _options[_option].choices or (0.6,)
        CASES += [(_name, {_option: value}) for value in _values if value != _options[_option].default]
IDS = [" ".join([name, *(f"{k}={v}" for k, v in given.items())]) for name, given in CASES]
# Two adapters of one rank are what every method takes.
RANKS = (3, 3)

every = pytest.mark.parametrize(("name", "given"), CASES, ids=IDS)


def _laws(name: str) -> Laws:
    found: Laws = registry.load("methods", name).LAWS
    return found


def _gauge(name: str, given: Mapping[str, object]) -> bool:
    return _laws(name).ignores_split or given.get("on") == "deltas"


def _turns(name: str, given: Mapping[str, object]) -> bool:
    # Coordinates that turn with the deltas make anything that happens in them commute with turning. In knots only the
    # left side is such.
    return _laws(name).rotation_equivariant or given.get("space") == "core"


def _close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10 * float(wanted.abs().max()))


def _orthogonal(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return found


@every
def test_adapters_in_another_order_give_the_same_if_promised(name: str, given: dict[str, object]) -> None:
    terms = make.make_terms(RANKS, weights=(0.75, 1.5))
    turned = replace(terms, factors=terms.factors[::-1], weights=terms.weights[::-1], scales=terms.scales[::-1])

    one, two = make.run(name, terms, **given), make.run(name, turned, **given)

    if _laws(name).order_free:
        _close(two, one)
    else:
        assert float((two - one).norm()) > 0.01 * float(one.norm())


@every
def test_splitting_a_delta_otherwise_changes_nothing_if_promised(name: str, given: dict[str, object]) -> None:
    terms = make.make_terms(RANKS, weights=(0.75, 1.5))
    generator = torch.Generator().manual_seed(7)
    turned = []
    for f in terms.factors:
        g = torch.randn(f.rank, f.rank, generator=generator, dtype=torch.float64)
        turned.append(Factors(f.b @ g, torch.linalg.solve(g, f.a)))

    one, two = make.run(name, terms, **given), make.run(name, replace(terms, factors=tuple(turned)), **given)

    if _gauge(name, given):
        _close(two, one)
    else:
        assert float((two - one).norm()) > 0.01 * float(one.norm())


@every
def test_scale_passes_through(name: str, given: dict[str, object]) -> None:
    terms = make.make_terms(RANKS, weights=(0.75, 1.5))
    scales = tuple(2.5 * s for s in terms.scales if s is not None)
    larger = replace(terms, factors=tuple(Factors(2.5 * f.b, f.a) for f in terms.factors), scales=scales)

    _close(make.run(name, larger, **given), 2.5 * make.run(name, terms, **given))


@every
def test_turning_both_sides_turns_the_result_if_promised(name: str, given: dict[str, object]) -> None:
    terms = make.make_terms(RANKS, weights=(0.75, 1.5))
    left, right = _orthogonal(make.OUT, 3), _orthogonal(make.IN, 4)
    turned = replace(terms, factors=tuple(Factors(left @ f.b, f.a @ right) for f in terms.factors))

    one, two = left @ make.run(name, terms, **given) @ right, make.run(name, turned, **given)

    if _turns(name, given):
        _close(two, one)
    elif not {"space", "on"} & given.keys() or given.get("space") == "knots":
        assert float((two - one).norm()) > 0.01 * float(one.norm())


@every
def test_an_adapter_alone_at_weight_one_comes_back_if_promised(name: str, given: dict[str, object]) -> None:
    terms = make.make_terms((3,))
    wanted = terms.factors[0].b @ terms.factors[0].a

    found = make.run(name, terms, **given)

    if _laws(name).keeps_one:
        _close(found, wanted)
    elif not given:
        assert float((found - wanted).norm()) > 0.01 * float(wanted.norm())


@every
def test_equal_seeds_give_equal_bytes_and_names_draw_their_own(name: str, given: dict[str, object]) -> None:
    terms = make.make_terms(RANKS)

    one, again, other = (make.run(name, replace(terms, seed=seed), **given).numpy().tobytes() for seed in (3, 3, 4))
    elsewhere = make.run(name, replace(terms, seed=3, name="layer.k"), **given).numpy().tobytes()

    assert one == again
    # What is random depends on the order, and nothing else does.
    assert (one != other) == (one != elsewhere) == (not _laws(name).order_free)


@every
def test_adapters_of_zeros_give_zeros(name: str, given: dict[str, object]) -> None:
    terms = make.make_terms(RANKS)
    zeros = replace(terms, factors=tuple(Factors(0 * f.b, f.a) for f in terms.factors))

    assert not make.run(name, zeros, **given).any()


@every
def test_an_untrained_adapter_beside_another_does_no_harm(name: str, given: dict[str, object]) -> None:
    terms = make.make_terms(RANKS)
    first, second = terms.factors

    assert make.run(name, replace(terms, factors=(first, Factors(0 * second.b, second.a))), **given).isfinite().all()


@every
def test_weights_are_scales_where_the_method_says_no_more(name: str, given: dict[str, object]) -> None:
    terms = make.make_terms(RANKS, weights=(0.75, 1.5))
    folded = replace(
        terms,
        factors=tuple(Factors(w * f.b, f.a) for w, f in zip(terms.weights, terms.factors, strict=True)),
        weights=(1.0, 1.0),
        scales=tuple(w * s for w, s in zip(terms.weights, terms.scales, strict=True) if s is not None),
    )
    apart = {"slerp", "karcher", "fedex", "peft-ties", "peft-dare", "peft-linear", "peft-magnitude-prune"}
    if name in apart or given.get("average") == "weights":
        pytest.skip("weights mean more than a scale here")

    _close(make.run(name, folded, **given), make.run(name, terms, **given))


def test_every_method_has_laws_and_options_that_have_their_defaults() -> None:
    for name in registry.names("methods"):
        assert isinstance(_laws(name), Laws)
        for option in methods.options_of(name):
            assert option.about
            assert option.parsed(option.default) == option.default


def test_settings_are_strict() -> None:
    assert methods.settings("ties", {"density": "0.3"}) == {
        "density": 0.3, "majority": "sum", "average": "count", "space": "full",
    }  # fmt: skip
    for given, message in [
        ({"densty": 0.3}, "no option 'densty'"),
        ({"density": 0}, "above 0 and at most 1"),
        ({"density": "much"}, "cannot be 'much'"),
        ({"density": float("nan")}, "cannot be"),
        ({"space": "ful"}, "there are: full, core, knots"),
    ]:
        with pytest.raises(LoraToolsError, match=message):
            methods.settings("ties", given)
    with pytest.raises(LoraToolsError, match="it has none"):
        methods.settings("linear", {"density": 0.3})
    assert Option("n", 3, "", low=1).parsed("4") == 4
    for bad in ("4.5", 4.5, 0, True):
        with pytest.raises(LoraToolsError, match="whole number of at least 1"):
            Option("n", 3, "", low=1).parsed(bad)


def test_terms_draw_other_numbers_for_each_adapter() -> None:
    terms = Terms("m", (), (), (), seed=1)

    assert torch.rand(3, generator=terms.generator(0)).tolist() != torch.rand(3, generator=terms.generator(1)).tolist()
