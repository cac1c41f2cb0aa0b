"""Every layer that PEFT's LoRA wraps x every option: what is merged equals PEFT's own merge, in float64."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

warnings.filterwarnings("ignore", category=DeprecationWarning)
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

import loratools  # noqa: E402
from loratools.errors import UnsupportedError, UsageError  # noqa: E402


class Layers(nn.Module):
    """One of each; no two sizes are equal, but where a square is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 10)
        self.square = nn.Linear(7, 7)
        self.conv1d_gpt2 = Conv1D(9, 5)
        self.conv1 = nn.Conv1d(4, 8, 3)
        self.conv2 = nn.Conv2d(5, 11, (3, 2))
        self.conv2_1x1 = nn.Conv2d(6, 9, 1)
        self.conv3 = nn.Conv3d(3, 7, 2)
        self.embedding = nn.Embedding(13, 6)
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x


LAYERS = ("linear", "square", "conv1d_gpt2", "conv1", "conv2", "conv2_1x1", "conv3", "embedding")
# PEFT writes one flag for all, which it sets for the layer of GPT-2 and then ignores for the others.
TOGETHER = [layer for layer in LAYERS if layer != "conv1d_gpt2"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora rslora": {"use_dora": True, "use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "patterns": {"rank_pattern": {"e.*": 2, "linear": 5}, "alpha_pattern": {".*conv.*": 7}},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
}


def randomised(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
            parameter.data = parameter.data + noise if "magnitude" in name or "bias" in name else noise


def base_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Layers().double()


def saved_base(model: nn.Module, folder: Path, config: Mapping[str, object] | None = None) -> Path:
    folder.mkdir(parents=True)
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def trained(folder: Path, *, seed: int = 1, model: nn.Module | None = None, **options: Any) -> Path:
    """An adapter of random values, saved by PEFT."""
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": TOGETHER, **options})
    wrapped = get_peft_model(copy.deepcopy(model or base_model()), config, autocast_adapter_dtype=False)
    randomised(wrapped.double(), seed)
    wrapped.save_pretrained(folder)
    return folder


def merged_by_peft(model: nn.Module, adapter: Path) -> dict[str, Tensor]:
    wrapped = PeftModel.from_pretrained(copy.deepcopy(model), adapter, autocast_adapter_dtype=False).double()
    return {n: t.detach() for n, t in wrapped.merge_and_unload().state_dict().items()}


def assert_equal_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-13, msg=name)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_merge_equals_pefts(tmp_path: Path, layer: str, option: str) -> None:
    if layer == "embedding" and option == "lora_bias":
        pytest.skip("PEFT has no bias for embeddings")
    base = saved_base(base_model(), tmp_path / "base")
    adapter = trained(tmp_path / "adapter", **{**OPTIONS[option], "target_modules": [layer]})

    loratools.merge(base, [adapter], tmp_path / "merged")

    found = load_file(tmp_path / "merged" / "model.safetensors")
    original = base_model().state_dict()
    assert not torch.equal(found[f"{layer}.weight"], original[f"{layer}.weight"])
    assert_equal_weights(found, merged_by_peft(base_model(), adapter))


def test_rows_and_columns_swapped_would_be_seen(tmp_path: Path) -> None:
    """The comparison can fail: a magnitude taken for that of another layer, a factor transposed."""
    base = saved_base(base_model(), tmp_path / "base")
    adapter = trained(tmp_path / "adapter", use_dora=True, target_modules=["square"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.square.lora_A.weight"
    for change in ("lora_magnitude_vector", "swapped"):
        changed = {n: t.roll(1) if change in n else t for n, t in tensors.items()}
        if change == "swapped":
            changed[key], changed[key.replace("_A", "_B")] = tensors[key.replace("_A", "_B")].T, tensors[key].T
        save_file({n: t.contiguous() for n, t in changed.items()}, adapter / "adapter_model.safetensors")
        loratools.merge(base, [adapter], tmp_path / change)
        save_file(tensors, adapter / "adapter_model.safetensors")
        with pytest.raises(AssertionError):
            assert_equal_weights(
                load_file(tmp_path / change / "model.safetensors"), merged_by_peft(base_model(), adapter)
            )


@pytest.mark.parametrize("option", ["plain", "dora", "lora_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bases_of_other_dtypes_are_the_float64_result_rounded(tmp_path: Path, option: str, dtype: torch.dtype) -> None:
    rounded = base_model().to(dtype)
    base = saved_base(rounded, tmp_path / "base")
    layers = [layer for layer in TOGETHER if layer != "embedding" or option != "lora_bias"]
    adapter = trained(tmp_path / "adapter", **{**OPTIONS[option], "target_modules": layers})

    report = loratools.merge(base, [adapter], tmp_path / "merged")

    exact = merged_by_peft(rounded.double(), adapter)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    for name, expected in exact.items():
        spacing = torch.finfo(dtype).eps * expected.abs().clamp(min=torch.finfo(dtype).tiny) + 1e-6
        assert ((found[name].double() - expected).abs() <= spacing).all(), name
    assert report.verified
    assert report.max_error_ratio is not None
    assert report.max_error_ratio <= 1


def test_deltas_of_adapters_add_up_in_any_order_also_with_magnitudes(tmp_path: Path) -> None:
    base = saved_base(base_model(), tmp_path / "base")
    adapters = [
        trained(tmp_path / "dora", seed=1, use_dora=True),
        trained(tmp_path / "plain", seed=2),
        trained(tmp_path / "other", seed=3, use_dora=True, r=2),
    ]
    weights = [0.7, -0.4, 1.3]

    loratools.merge(base, list(zip(adapters, weights, strict=True)), tmp_path / "one")
    loratools.merge(base, list(zip(adapters, weights, strict=True))[::-1], tmp_path / "other way")

    expected = {n: t.clone() for n, t in base_model().state_dict().items()}
    for adapter, weight in zip(adapters, weights, strict=True):
        alone = merged_by_peft(base_model(), adapter)
        for name, original in base_model().state_dict().items():
            expected[name] += weight * (alone[name] - original)
    for folder in ("one", "other way"):
        found = load_file(tmp_path / folder / "model.safetensors")
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=1e-12)


def test_attention_gets_its_deltas_once_where_peft_adds_that_of_out_proj_twice(tmp_path: Path) -> None:
    base = saved_base(base_model(), tmp_path / "base")
    adapter = trained(tmp_path / "adapter", target_modules=["attention"])

    report = loratools.merge(base, [adapter], tmp_path / "merged")

    tensors = load_file(adapter / "adapter_model.safetensors")
    found, original = load_file(tmp_path / "merged" / "model.safetensors"), base_model().state_dict()
    for module, weight in (("attention", "in_proj_weight"), ("attention.base_layer.out_proj", "out_proj.weight")):
        a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        expected = original[f"attention.{weight}"] + 5 / 3 * b @ a
        torch.testing.assert_close(found[f"attention.{weight}"], expected, rtol=1e-12, atol=1e-13)
    assert any("out_proj twice" in warning for warning in report.warnings)


class Experts(nn.Module):
    def __init__(self, square: bool, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 8 if square else 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Mixture(nn.Module):
    def __init__(self, square: bool = False, is_transposed: bool = False) -> None:
        super().__init__()
        self.experts = Experts(square, is_transposed)
        self.router = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x


PARAMETERS = [["experts.gate_up_proj", "experts.down_proj"], ["experts.down_proj"], ["router.weight"]]


@pytest.mark.parametrize(
    ("parameters", "square", "is_transposed", "rslora"),
    [*itertools.product(PARAMETERS, [False], [False], [False, True]), (PARAMETERS[0], True, False, False),
     (PARAMETERS[0], True, True, False), (PARAMETERS[0], False, True, True)],
)  # fmt: skip
def test_fused_experts_merge_as_peft_merges_them(
    tmp_path: Path, parameters: list[str], square: bool, is_transposed: bool, rslora: bool
) -> None:
    torch.manual_seed(0)
    model = Mixture(square, is_transposed).double()
    # The model type tells how layers of experts are stored in memory, where their sizes do not.
    base = saved_base(model, tmp_path / "base", {"model_type": "gpt_oss" if is_transposed else "qwen3_moe"})
    options: dict[str, Any] = {"target_modules": [], "target_parameters": parameters, "use_rslora": rslora}
    adapter = trained(tmp_path / "adapter", model=model, **options)

    loratools.merge(base, [adapter], tmp_path / "merged")

    found, expected = load_file(tmp_path / "merged" / "model.safetensors"), merged_by_peft(model, adapter)
    assert_equal_weights(found, expected)
    assert not torch.equal(found[parameters[0]], model.state_dict()[parameters[0]])


def test_square_experts_of_a_peft_that_is_not_known_need_a_word(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mixture(square=True).double()
    base = saved_base(model, tmp_path / "base", {"model_type": "qwen3_moe"})
    adapter = trained(tmp_path / "adapter", model=model, target_modules=[], target_parameters=PARAMETERS[0])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "unknown"}))

    with pytest.raises(loratools.MismatchError, match="--expert-orientation"):
        loratools.merge(base, [adapter], tmp_path / "merged")
    loratools.merge(base, [adapter], tmp_path / "merged", expert_orientation="out-in")

    assert_equal_weights(load_file(tmp_path / "merged" / "model.safetensors"), merged_by_peft(model, adapter))


def test_an_old_peft_took_square_experts_as_in_out(tmp_path: Path) -> None:
    """PEFT up to 0.18: `einsum("o r e, e r i -> e i o")` whatever the layer says."""
    torch.manual_seed(0)
    model = Mixture(square=True).double()
    base = saved_base(model, tmp_path / "base", {"model_type": "qwen3_moe"})
    adapter = trained(tmp_path / "adapter", model=model, target_modules=[], target_parameters=["experts.gate_up_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "0.18.1"}))

    loratools.merge(base, [adapter], tmp_path / "merged")

    a, b = (load_file(adapter / "adapter_model.safetensors")[f"base_model.model.experts.lora_{x}.weight"] for x in "AB")
    delta = torch.einsum("ore,eri->eio", b.reshape(8, 3, 3), a.reshape(3, 3, 8)) * 5 / 3
    found = load_file(tmp_path / "merged" / "model.safetensors")["experts.gate_up_proj"]
    torch.testing.assert_close(found, model.state_dict()["experts.gate_up_proj"] + delta, rtol=1e-12, atol=1e-13)


def test_experts_packed_by_expert_are_read_so_where_it_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mixture().double()
    base = saved_base(model, tmp_path / "base", {"model_type": "qwen3_moe"})
    adapter = trained(tmp_path / "adapter", model=model, target_modules=[], target_parameters=["experts.down_proj"])

    loratools.merge(base, [adapter], tmp_path / "merged", expert_packing="expert-major")

    a, b = (load_file(adapter / "adapter_model.safetensors")[f"base_model.model.experts.lora_{x}.weight"] for x in "AB")
    delta = torch.einsum("oer,eri->eoi", b.reshape(6, 3, 3), a.reshape(3, 3, 4)) * 5 / 3
    found = load_file(tmp_path / "merged" / "model.safetensors")["experts.down_proj"]
    torch.testing.assert_close(found, model.state_dict()["experts.down_proj"] + delta, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("indices", [[1, 4, 12], {"embedding": [0, 7]}])
def test_trained_tokens_take_their_rows(tmp_path: Path, indices: Any) -> None:
    class Named(Layers):
        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

    torch.manual_seed(0)
    model = Named().double()
    base = saved_base(model, tmp_path / "base")
    adapter = trained(tmp_path / "adapter", model=model, target_modules=["linear"], trainable_token_indices=indices)

    loratools.merge(base, [adapter], tmp_path / "merged")

    found, expected = load_file(tmp_path / "merged" / "model.safetensors"), merged_by_peft(model, adapter)
    assert_equal_weights(found, expected)
    rows = indices if isinstance(indices, list) else indices["embedding"]
    changed = (found["embedding.weight"] != model.state_dict()["embedding.weight"]).any(dim=1).nonzero().flatten()
    assert changed.tolist() == rows


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_moved_its_base_needs_what_it_began_as(tmp_path: Path, init: str) -> None:
    base = saved_base(base_model().float(), tmp_path / "base")
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["linear", "square"], init_lora_weights=init)
    wrapped = get_peft_model(base_model().float(), config)
    wrapped.save_pretrained(tmp_path / "began")
    generator = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = {n: t.detach() for n, t in wrapped.merge_and_unload().state_dict().items()}

    with pytest.raises(UnsupportedError, match="--initial") as raised:
        loratools.merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    loratools.merge(base, [tmp_path / "adapter"], tmp_path / "merged", initial=[tmp_path / "began"])

    assert init in raised.value.message
    found = load_file(tmp_path / "merged" / "model.safetensors")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=2e-6, msg=name)
    with pytest.raises(UsageError, match="2 initial"):
        loratools.merge(base, [tmp_path / "adapter"], tmp_path / "x", initial=[tmp_path / "began"] * 2)


@pytest.mark.parametrize("option", OPTIONS)
def test_what_is_written_peft_loads_to_the_same_merge(tmp_path: Path, option: str) -> None:
    layers = [layer for layer in TOGETHER if layer != "embedding" or option != "lora_bias"]
    adapter = trained(tmp_path / "adapter", **{**OPTIONS[option], "target_modules": layers})

    loratools.save(loratools.load(adapter), tmp_path / "written")
    loratools.save(loratools.load(tmp_path / "written"), tmp_path / "again")

    assert_equal_weights(merged_by_peft(base_model(), tmp_path / "written"), merged_by_peft(base_model(), adapter))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "written" / file).read_bytes()


def test_fused_experts_are_written_as_peft_wraps_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mixture().double()
    adapter = trained(tmp_path / "adapter", model=model, target_modules=[], target_parameters=PARAMETERS[0])

    loratools.save(loratools.load(adapter), tmp_path / "written")

    assert_equal_weights(merged_by_peft(model, tmp_path / "written"), merged_by_peft(model, adapter))
