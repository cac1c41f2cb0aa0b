"""What `add_weighted_adapter` of PEFT makes of the same adapters, on a real model of one layer."""

from __future__ import annotations

import method_terms as make
import peft
import pytest
import torch
from torch import Tensor

from loratools.algebra.lowrank import Factors
from loratools.errors import MismatchError, UnsupportedError
from loratools.methods import Terms

OUT, IN, RANK = 9, 7, 3
ALPHAS = (6.0, 1.5)


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(IN, OUT, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


def _peft_model() -> peft.PeftModel:
    torch.manual_seed(3)
    configs = [peft.LoraConfig(r=RANK, lora_alpha=a, target_modules=["layer"]) for a in ALPHAS]  # type: ignore[arg-type]
    model = peft.get_peft_model(_Model(), configs[0], adapter_name="a", autocast_adapter_dtype=False)
    model.add_adapter("b", configs[1], autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return model


def _layer(model: peft.PeftModel) -> torch.nn.Module:
    found: torch.nn.Module = model.base_model.model.layer  # type: ignore[union-attr, assignment]
    return found


def _terms(model: peft.PeftModel, weights: tuple[float, float]) -> Terms:
    layer = _layer(model)
    factors, scales = [], []
    for name, alpha in zip("ab", ALPHAS, strict=True):
        scale = alpha / RANK
        b = layer.lora_B[name].weight.detach().double() * scale  # type: ignore[index, union-attr]
        factors.append(Factors(b, layer.lora_A[name].weight.detach().double()))  # type: ignore[index, union-attr]
        scales.append(scale)
    return Terms("layer", tuple(factors), weights, tuple(scales))


@pytest.mark.parametrize("weights", [(0.7, 1.2), (1.0, -0.5)])
@pytest.mark.parametrize(
    ("kind", "name", "options", "more"),
    [
        ("linear", "peft-linear", {}, {}),
        ("cat", "peft-cat", {}, {}),
        ("cat", "linear", {}, {}),
        ("ties", "peft-ties", {"density": 0.4}, {"density": 0.4}),
        ("ties", "peft-ties", {"majority": "frequency"}, {"density": 0.5, "majority_sign_method": "frequency"}),
        ("magnitude_prune", "peft-magnitude-prune", {"density": 0.6}, {"density": 0.6}),
        ("ties_svd", "peft-ties", {"density": 0.3, "on": "deltas"}, {"density": 0.3, "svd_rank": IN}),
        ("magnitude_prune_svd", "peft-magnitude-prune", {"on": "deltas"}, {"density": 0.5, "svd_rank": IN}),
        ("svd", "linear", {}, {"svd_rank": IN}),
    ],
)
def test_delta_is_pefts(
    kind: str, name: str, options: dict[str, object], more: dict[str, object], weights: tuple[float, float]
) -> None:
    model = _peft_model()
    found = make.run(name, _terms(model, weights), **options)

    model.add_weighted_adapter(["a", "b"], list(weights), "both", combination_type=kind, **more)  # type: ignore

    wanted = _layer(model).get_delta_weight("both").detach()  # type: ignore[operator]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("join", ["linear", "ties"])
@pytest.mark.parametrize("on", ["factors", "deltas"])
def test_dare_is_pefts_from_the_same_random_numbers(join: str, on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _peft_model()
    terms = _terms(model, (0.7, -1.2))
    found = make.run("peft-dare", terms, density=0.6, join=join, on=on)

    # PEFT draws in the dtype of the adapters, from the global state, after initialising what it then overwrites.
    model = model.float()
    kind = f"dare_{join}" + ("_svd" if on == "deltas" else "")
    more = {"svd_rank": IN} if on == "deltas" else {}
    inner = ("_svd" if on == "deltas" else "") + "_generalized_task_arithmetic_weighted_adapter"
    original = getattr(model.base_model, inner)

    def seeded(*given: object, **named: object) -> object:
        torch.default_generator.set_state(terms.generator(0).get_state())
        return original(*given, **named)

    monkeypatch.setattr(model.base_model, inner, seeded)
    model.add_weighted_adapter(["a", "b"], [0.7, -1.2], "both", combination_type=kind, density=0.6, **more)

    wanted = _layer(model).get_delta_weight("both").detach().double()  # type: ignore[operator]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_linear_of_peft_is_as_far_from_the_sum_as_the_sum_is_large() -> None:
    terms = make.make_terms((8, 8), shape=(400, 300), scales=(1.0, 1.0))
    wanted = torch.stack(make.deltas(terms)).sum(dim=0)

    error = float((make.run("peft-linear", terms) - wanted).norm() / wanted.norm())

    assert error == pytest.approx(1.0, abs=0.1)


def test_factors_of_other_ranks_and_other_kinds_are_refused() -> None:
    with pytest.raises(MismatchError, match="different ranks"):
        make.run("peft-linear", make.make_terms((2, 3)))
    terms = make.make_terms((2, 2))
    for name in ("peft-linear", "peft-cat"):
        with pytest.raises(UnsupportedError, match="not a plain pair"):
            make.run(name, Terms(terms.name, terms.factors, terms.weights, (1.0, None)))
