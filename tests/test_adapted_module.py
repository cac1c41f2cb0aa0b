"""Modules of an adapter as arrays, and adapters made of arrays: against products written out in float64, and PEFT."""

from __future__ import annotations

import pickle
from pathlib import Path

import factories
import numpy as np
import pytest
import torch

import loratools
from loratools.errors import FormatError, LoraToolsError, MismatchError, UnsupportedError, UsageError

NAME = "model.layers.0.self_attn.q_proj"  # (10, 6), rank 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return factories.adapter_folder(tmp_path / "adapter", alpha=12)


def stored(name: str = NAME) -> tuple[np.ndarray, np.ndarray]:
    """A (4, 6) and B (10, 4) as the factory writes them."""
    a, b = factories.factors()[name]
    return a.numpy(), b.numpy()


def test_module_has_its_factors_as_stored_and_its_scale(folder: Path) -> None:
    a, b = stored()

    module = loratools.load(folder)[NAME]

    assert (module.name, module.kind, module.rank, module.alpha, module.shape) == (NAME, "lora", 4, 12, (10, 6))
    assert module.scale == 12 / 4
    assert module.a.dtype == module.b.dtype == np.float32
    assert np.array_equal(module.a, a)
    assert np.array_equal(module.b, b)


def test_delta_is_the_scaled_product_in_float64_rounded_once(folder: Path) -> None:
    a, b = stored()
    exact = 3.0 * (b.astype(np.float64) @ a.astype(np.float64))

    adapter = loratools.load(folder)

    assert np.allclose(adapter[NAME].delta(dtype="float64"), exact, rtol=1e-14, atol=0)
    assert adapter.delta(NAME).dtype == np.float32
    # Half a unit in the last place of float32, and what float64 leaves of doubt.
    assert (abs(adapter.delta(NAME) - exact) <= abs(exact) * (2**-24 + 1e-12)).all()


def test_update_gives_its_delta_as_the_module_does(folder: Path) -> None:
    adapter = loratools.load(folder)

    assert np.array_equal(adapter.updates[NAME].delta(), adapter.delta(NAME))


def test_path_with_a_weight_is_an_error_that_shows_the_pair_to_give(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give the weight beside the path") as caught:
        loratools.combine([f"{folder}=0.5"])

    assert caught.value.message.endswith(f"('{folder}', 0.5)")


def test_factors_multiply_to_the_delta(folder: Path) -> None:
    adapter = loratools.load(folder)

    a, b = adapter[NAME].factors()

    assert (a.shape, b.shape, a.dtype) == ((4, 6), (10, 4), np.float64)
    assert np.allclose(b @ a, adapter.delta(NAME, dtype="float64"), rtol=1e-13)


def test_torch_tensors_are_given_where_they_are_asked_for(folder: Path) -> None:
    module = loratools.load(folder)[NAME]

    a, b = module.factors(as_torch=True)

    assert isinstance(a, torch.Tensor)
    assert torch.allclose((b @ a).float(), module.delta(as_torch=True))


def test_sixteen_bit_factors_are_given_exactly(tmp_path: Path) -> None:
    folder = factories.adapter_folder(tmp_path / "a", dtype=torch.bfloat16)
    a = factories.factors(dtype=torch.bfloat16)[NAME][0]

    assert np.array_equal(loratools.load(folder)[NAME].a, a.float().numpy())


def test_adapter_is_a_mapping_of_its_modules(folder: Path) -> None:
    adapter = loratools.load(folder)

    assert len(adapter) == len(factories.MODULES)
    assert list(adapter) == sorted(factories.MODULES)
    assert NAME in adapter
    assert "model.layers.9.self_attn.q_proj" not in adapter
    assert bool(loratools.Adapter({}))


@pytest.mark.parametrize("unknown", ["model.layers.0.self_attn.q_porj", "layers.0.self_attn.q_proj"])
def test_unknown_module_is_an_error_with_the_nearest_names(folder: Path, unknown: str) -> None:
    with pytest.raises(LoraToolsError) as caught:
        loratools.load(folder)[unknown]

    assert isinstance(caught.value, KeyError)
    assert caught.value.details[0] == NAME
    assert caught.value.hint == f"did you mean '{NAME}'?"


def test_replaced_weight_is_no_module_and_the_error_says_where_it_is(tmp_path: Path) -> None:
    extra = {"score.weight": torch.ones(2, 6)}
    folder = factories.adapter_folder(tmp_path / "a", extra=extra, config={"modules_to_save": ["score"]})
    adapter = loratools.load(folder)

    with pytest.raises(LoraToolsError, match=r"'score\.weight' is a replaced weight") as caught:
        adapter["score.weight"]

    assert "replacements" in str(caught.value.hint)


def test_delta_that_depends_on_the_base_asks_for_the_weight(tmp_path: Path) -> None:
    a, b = stored()
    magnitude = np.linspace(0.5, 2.0, 10, dtype=np.float32)
    extra = {f"{NAME}.lora_magnitude_vector": torch.from_numpy(magnitude)}
    folder = factories.adapter_folder(
        tmp_path / "a", modules={NAME: (10, 6)}, alpha=8, extra=extra, config={"use_dora": True}
    )
    weight = np.random.default_rng(0).standard_normal((10, 6))
    # DoRA: m (W + 2 B A) / |W + 2 B A| - W, the norm of each row.
    adapted = weight + 2.0 * (b.astype(np.float64) @ a.astype(np.float64))
    exact = magnitude[:, None] * adapted / np.linalg.norm(adapted, axis=1, keepdims=True) - weight
    module = loratools.load(folder)[NAME]

    with pytest.raises(UsageError, match="depends on the weight") as caught:
        module.delta()
    with pytest.raises(MismatchError, match="a weight of 6 -> 10"):
        module.delta(base=weight.T.copy())
    with pytest.raises(UnsupportedError, match="not a product of factors"):
        module.factors()

    assert "base=weight" in str(caught.value.hint)
    assert np.allclose(module.delta(base=weight, dtype="float64"), exact, rtol=1e-10)


def test_delta_of_fused_experts_has_an_axis_of_experts() -> None:
    from loratools.tensors.lazy import from_array
    from loratools.updates.lora_experts import LoRAExperts

    generator = np.random.default_rng(1)
    a, b = generator.standard_normal((3 * 2, 5)), generator.standard_normal((7, 2 * 3))
    update = LoRAExperts(from_array(a), from_array(b), experts=3, alpha=2, alpha_source="config")

    delta = loratools.Adapter({"mlp.experts.down_proj": update}).delta("mlp.experts.down_proj", dtype="float64")

    # PEFT: rows of A together, columns of B apart; scale 2 / 2.
    assert delta.shape == (3, 7, 5)
    assert np.allclose(delta[1], b[:, 1::3] @ a[2:4], rtol=1e-13)


def test_kind_without_a_factor_says_which_tensors_it_has() -> None:
    from loratools.tensors.lazy import from_array
    from loratools.updates.full import Full

    module = loratools.Adapter({NAME: Full(from_array(np.ones((10, 6), np.float32)), 1.0)})[NAME]

    with pytest.raises(UnsupportedError, match="is a full, which has no factor A"):
        _ = module.a
    assert np.array_equal(module.delta(), np.ones((10, 6)))


def test_adapter_of_factors_is_saved_and_loaded_with_the_same_deltas(tmp_path: Path) -> None:
    a, b = stored()
    other = "model.layers.1.mlp.up_proj"
    given = {NAME: (a, b, 0.25), other: (torch.ones(2, 6), torch.full((9, 2), 0.5))}

    loratools.save(loratools.Adapter.from_factors(given, base_model="tiny/base"), tmp_path / "out")
    adapter = loratools.load(tmp_path / "out")

    assert adapter.base_model == "tiny/base"
    assert adapter[NAME].scale == 0.25
    assert np.allclose(adapter.delta(NAME, dtype="float64"), 0.25 * (b.astype(float) @ a.astype(float)), rtol=1e-14)
    assert np.array_equal(adapter.delta(other), np.ones((9, 6)))


def test_factors_that_make_no_product_are_all_named() -> None:
    a, b = stored()

    with pytest.raises(MismatchError, match="2 of 3 pairs of factors") as caught:
        loratools.Adapter.from_factors({"x": (a, b), "y": (b, a), "z": (a, a.astype(np.int32))})

    assert caught.value.details == ("y   A (10, 4) and B (4, 6)", "z   A (4, 6) and B (4, 6)")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": ([[1.0]], [[1.0]])}, "of type list, and a numpy array"),
        ({"x": (np.ones((1, 1), complex), np.ones((1, 1)))}, "an array of complex128"),
        ({"x": np.ones((1, 1))}, "'x' is given as"),
        ({"x": (np.ones((1, 1)), np.ones((1, 1)), float("nan"))}, "scale of 'x' is nan"),
    ],
)
def test_factors_that_are_no_arrays_are_a_usage_error(given: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loratools.Adapter.from_factors(given)  # type: ignore[arg-type]


def tiny_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.ModuleDict(
        {"up": torch.nn.Linear(6, 10), "down": torch.nn.Linear(10, 7), "head": torch.nn.Linear(7, 3)}
    )


def test_state_dict_of_peft_is_read_and_given_back_unchanged() -> None:
    import peft

    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["up", "down"], rank_pattern={"down": 2}, modules_to_save=["head"]
    )
    model = peft.get_peft_model(tiny_model(), config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    state = peft.get_peft_model_state_dict(model)
    peft_delta = model.base_model.model["down"].get_delta_weight("default").detach()

    adapter = loratools.Adapter.from_state_dict(state, config=config)
    again = adapter.to_state_dict()

    assert (adapter["up"].rank, adapter["down"].rank, adapter["down"].scale) == (4, 2, 6)
    assert np.allclose(adapter.delta("down"), peft_delta.numpy(), rtol=1e-5, atol=1e-6)
    assert set(adapter.replacements) == {"head.weight", "head.bias"}
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_state_dict_given_back_is_loaded_by_peft_to_the_same_deltas(folder: Path) -> None:
    import peft

    a, b = np.ones((4, 6), np.float32), np.arange(40, dtype=np.float32).reshape(10, 4)
    adapter = loratools.Adapter.from_factors({"up": (a, b, 0.5)})
    config = peft.LoraConfig(
        **{k: v for k, v in adapter.peft_config().items() if k in ("r", "lora_alpha")}, target_modules=["up"]
    )
    model = peft.get_peft_model(tiny_model(), config)

    peft.set_peft_model_state_dict(model, adapter.to_state_dict())

    delta = model.base_model.model["up"].get_delta_weight("default").detach().numpy()
    assert np.allclose(delta, 0.5 * (b @ a), rtol=1e-6)


def test_state_dict_without_a_config_says_what_is_assumed(folder: Path) -> None:
    adapter = loratools.Adapter.from_state_dict(loratools.load(folder).to_state_dict())

    assert adapter[NAME].scale == 1
    assert any("alpha is assumed to be the rank" in warning for warning in adapter.warnings)


def test_state_dict_with_half_a_pair_is_refused(folder: Path) -> None:
    tensors = loratools.load(folder).to_state_dict()
    del tensors[f"base_model.model.{NAME}.lora_B.weight"]

    with pytest.raises(FormatError):
        loratools.Adapter.from_state_dict(tensors)
    with pytest.raises(UsageError, match="config is of type int"):
        loratools.Adapter.from_state_dict(tensors, config=3)


def test_adapter_with_an_uncertain_scale_gives_no_delta(folder: Path) -> None:
    from dataclasses import replace

    adapter = replace(loratools.load(folder), uncertainties=("two ranks",))

    for call in (lambda: adapter.delta(NAME), adapter.to_state_dict, adapter.peft_config):
        with pytest.raises(UnsupportedError, match="uncertain"):
            call()


def test_module_survives_pickling(folder: Path) -> None:
    module = loratools.load(folder)[NAME]

    assert np.array_equal(pickle.loads(pickle.dumps(module)).delta(), module.delta())
