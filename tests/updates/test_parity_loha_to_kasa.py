"""LoHa to KaSA, every layer that PEFT wraps x every option: what is merged equals PEFT's own merge, in float64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

warnings.filterwarnings("ignore", category=DeprecationWarning)
import peft  # noqa: E402
from peft import PeftModel, get_peft_model  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

import loratools  # noqa: E402

# What leaves the weight as it is at 1 and not at 0.
AROUND_ONE = ("ia3_l", "boft_s")


class Layers(nn.Module):
    """One of each; no two sizes are equal, but where a square is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 18)
        self.bare = nn.Linear(18, 12, bias=False)
        self.square = nn.Linear(8, 8)
        self.conv1d_gpt2 = Conv1D(9, 6)
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.conv2 = nn.Conv2d(6, 10, 3)
        self.conv2_even = nn.Conv2d(4, 5, 2)
        self.conv2_oblong = nn.Conv2d(6, 9, (3, 2))
        self.conv2_1x1 = nn.Conv2d(6, 9, 1)
        self.conv2_grouped = nn.Conv2d(6, 9, 3, groups=3)
        self.conv3 = nn.Conv3d(3, 7, 2)
        self.embedding = nn.Embedding(13, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x


LINEAR = ("linear", "bare", "square")
CONV2 = ("conv2", "conv2_1x1")


def _each(config: str, layers: tuple[str, ...], **options: dict[str, Any]) -> dict[str, Any]:
    name = config.removesuffix("Config")
    return {f"{name} {o} {layer}": (config, layer, kw) for o, kw in options.items() for layer in layers}


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **_each(
        "LoHaConfig",
        (*LINEAR, *CONV2, "conv1", "conv2_oblong"),
        # Scales that float32 holds exactly, which PEFT rounds them to.
        flat={"r": 4, "alpha": 5},
        core={"r": 4, "alpha": 5, "use_effective_conv2d": True},
        patterns={"r": 4, "alpha": 5, "rank_pattern": {".*": 2}, "alpha_pattern": {".*": 7}},
    ),
    **_each(
        "LoKrConfig",
        (*LINEAR, *CONV2, "conv1", "conv2_oblong"),
        half={"r": 1, "alpha": 5},
        both={"r": 1, "alpha": 5, "decompose_both": True, "decompose_factor": 3},
        whole={"r": 64, "alpha": 5},
        factor={"r": 2, "alpha": 5, "decompose_factor": 2},
    ),
    # PEFT cannot compute the product of a Conv1d with a core.
    **_each(
        "LoKrConfig",
        (*LINEAR, *CONV2, "conv2_oblong"),
        core={"r": 1, "alpha": 3, "use_effective_conv2d": True, "decompose_factor": 2},
    ),
    **_each(
        "AdaLoraConfig",
        (*LINEAR, "conv1d_gpt2"),
        plain={"init_r": 6, "target_r": 4, "lora_alpha": 5, "r": 2, "total_step": 10},
        negative={"init_r": 6, "lora_alpha": -1, "total_step": 10},
    ),
    **_each("IA3Config", (*LINEAR, *CONV2, "conv1d_gpt2", "conv2_oblong", "conv2_grouped", "conv3"), outputs={}),
    **_each(
        "IA3Config",
        (*LINEAR, *CONV2, "conv1d_gpt2", "conv2_oblong", "conv2_grouped", "conv3"),
        inputs={"feedforward_modules": None},
    ),
    **_each(
        "OFTConfig",
        (*LINEAR, *CONV2, "embedding"),
        series={"oft_block_size": 2},
        long={"oft_block_size": 2, "num_cayley_neumann_terms": 8},
        four={"oft_block_size": 2, "num_cayley_neumann_terms": 4},
        three={"oft_block_size": 2, "num_cayley_neumann_terms": 3},
        two={"oft_block_size": 2, "num_cayley_neumann_terms": 2},
        exact={"oft_block_size": 2, "use_cayley_neumann": False},
        shared={"oft_block_size": 2, "block_share": True},
        constrained={"oft_block_size": 2, "coft": True, "eps": 0.4, "use_cayley_neumann": False},
        loosely={"oft_block_size": 2, "coft": True, "eps": 40.0, "module_dropout": 0.3},
        number={"r": 2, "oft_block_size": 0},
    ),
    **_each(
        "BOFTConfig", (*LINEAR, *CONV2), size={"boft_block_size": 2}, number={"boft_block_num": 2, "boft_block_size": 0}
    ),
    **_each("HRAConfig", (*LINEAR, *CONV2), product={"r": 3}, orthogonal={"r": 3, "apply_GS": True}),
    **_each(
        "MissConfig",
        LINEAR,
        std={"r": 5},
        even={"r": 2},
        bat={"r": 2, "init_weights": "bat"},
        mini={"r": 2, "mini_r": 2, "init_weights": "mini"},
        mini_uneven={"r": 5, "mini_r": 2, "init_weights": "mini"},
    ),
    **_each(
        "GloraConfig",
        ("bare",),
        **{f"{ab}": {"r": 3, "config_A_B": ab} for ab in ("lora", "vector", "constant", "none")},
    ),
    **_each(
        "GloraConfig",
        ("linear", "square"),
        **{
            f"{ab} {c} {de}": {"r": 3, "config_A_B": ab, "config_C": c, "config_D_E": de}
            for ab in ("lora", "vector", "constant", "none")
            for c in ("lora", "vector", "none")
            for de in ("vector", "constant", "none")
        },
    ),
    **_each("LoraConfig", LINEAR, kasa={"r": 3, "lora_alpha": 5, "kasa_config": peft.KasaConfig()}),
    **_each(
        "LoraConfig",
        LINEAR,
        kasa_rslora={"r": 3, "lora_alpha": 5, "use_rslora": True, "kasa_config": peft.KasaConfig()},
    ),
    **_each(
        "LoraConfig",
        LINEAR,
        **{
            f"blocks of {f}": {
                "r": 4,
                "lora_alpha": 5,
                "use_bdlora": peft.BdLoraConfig(
                    **{f"target_modules_bd_{f}": ["linear", "are"]}, nblocks=2, match_strict=False
                ),
            }
            for f in "ab"
        },
    ),
}


def base_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Layers().double()


def saved_base(model: nn.Module, folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def trained(folder: Path, case: str, *, seed: int = 1) -> Path:
    """An adapter of random values, saved by PEFT."""
    kind, layer, options = CASES[case]
    options = {"target_modules": [layer], **copy.deepcopy(options)}
    if kind == "IA3Config":
        inputs = "feedforward_modules" in options
        options["feedforward_modules"] = [layer] if inputs else []
    wrapped = get_peft_model(base_model(), getattr(peft, kind)(**options), autocast_adapter_dtype=False).double()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
            parameter.data = noise + any(part in name for part in AROUND_ONE)
    wrapped.save_pretrained(folder)
    return folder


def merged_by_peft(adapter: Path) -> dict[str, Tensor]:
    wrapped = PeftModel.from_pretrained(base_model(), adapter, autocast_adapter_dtype=False).double()
    return {n: t.detach() for n, t in wrapped.merge_and_unload().state_dict().items()}


def tolerance(case: str) -> float:
    """PEFT computes in float64 as we do, but for the bound of COFT and the SVD of KaSA, which it takes in float32."""
    rough = case.startswith(("OFT constrained", "Lora kasa"))
    return 1e-5 if rough else 1e-11


def assert_equal_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], within: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=within, atol=within, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_a_merge_equals_pefts(tmp_path: Path, case: str) -> None:
    adapter = trained(tmp_path / "adapter", case)
    base = saved_base(base_model(), tmp_path / "base")

    loratools.merge(base, [adapter], tmp_path / "merged")

    found = load_file(tmp_path / "merged" / "model.safetensors")
    layer = CASES[case][1]
    changed = {name for name, tensor in base_model().state_dict().items() if not torch.equal(found[name], tensor)}
    assert changed <= {f"{layer}.weight", f"{layer}.bias"}
    assert changed or "none" in case
    assert_equal_weights(found, merged_by_peft(adapter), tolerance(case))


def test_a_pruned_adalora_is_scaled_by_the_rank_it_began_with(tmp_path: Path) -> None:
    """Of one module all was pruned, of the other some: what is stored has the ranks that were left."""
    options = {"init_r": 6, "target_r": 2, "lora_alpha": 5, "total_step": 10, "target_modules": ["linear", "square"]}
    wrapped = get_peft_model(base_model(), peft.AdaLoraConfig(**options), autocast_adapter_dtype=False).double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and "ranknum" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
    kept = {"linear": [True, False, True, True, False, True], "square": [False] * 6}
    wrapped.peft_config["default"].rank_pattern = {f"{name}.lora_E.default": mask for name, mask in kept.items()}
    with torch.no_grad():
        for name, mask in kept.items():
            wrapped.get_submodule(f"base_model.model.{name}").lora_E["default"][~torch.tensor(mask)] = 0
    expected = copy.deepcopy(wrapped).merge_and_unload().state_dict()
    wrapped.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert [stored[f"base_model.model.{name}.lora_A"].shape[0] for name in kept] == [4, 0]

    loratools.merge(saved_base(base_model(), tmp_path / "base"), [tmp_path / "adapter"], tmp_path / "merged")

    assert_equal_weights(load_file(tmp_path / "merged" / "model.safetensors"), expected, 1e-11)


WHOLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama IA3": ("llama", "IA3Config", {}),
    "llama LoHa": ("llama", "LoHaConfig", {"r": 2, "target_modules": "all-linear"}),
    "llama LoKr": ("llama", "LoKrConfig", {"r": 1, "target_modules": "all-linear"}),
    "llama OFT": ("llama", "OFTConfig", {"oft_block_size": 2, "target_modules": ["q_proj", "embed_tokens"]}),
    "llama HRA": ("llama", "HRAConfig", {"r": 2, "target_modules": ["v_proj", "down_proj"]}),
    "llama MiSS": ("llama", "MissConfig", {"r": 3, "target_modules": ["v_proj", "down_proj"]}),
    "bert BOFT": ("bert", "BOFTConfig", {"boft_block_size": 2, "target_modules": ["query", "value"]}),
    "bert GLoRA": ("bert", "GloraConfig", {"r": 2, "target_modules": ["query", "value"]}),
    "bert KaSA": (
        "bert",
        "LoraConfig",
        {"r": 2, "target_modules": ["value", "dense"], "kasa_config": peft.KasaConfig()},
    ),
    "gpt2 IA3": ("gpt2", "IA3Config", {}),
    "gpt2 AdaLoRA": ("gpt2", "AdaLoraConfig", {"total_step": 10, "target_modules": ["c_attn", "attn.c_proj"]}),
}


def whole_model(family: str) -> nn.Module:
    """Random and tiny; of GPT-2, square layers that are stored as (in, out) as well."""
    torch.manual_seed(0)
    if family == "llama":
        made: nn.Module = tiny_models.llama(vocabulary=20, width=8, inner=12, heads=2, key_heads=1)
    elif family == "bert":
        made = transformers.BertModel(
            transformers.BertConfig(
                vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
            )
        )
    else:
        made = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=16)
        )
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.3
    return made.double().eval()


@pytest.mark.parametrize("case", WHOLE)
def test_a_merged_model_computes_what_pefts_does(tmp_path: Path, case: str) -> None:
    family, kind, options = WHOLE[case]
    model = whole_model(family)
    model.save_pretrained(tmp_path / "base")
    wrapped = get_peft_model(model, getattr(peft, kind)(**options), autocast_adapter_dtype=False).double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        # PEFT leaves the rank that AdaLoRA divides by open to training, and does not save it.
        if parameter.requires_grad and "ranknum" not in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
            parameter.data = noise + any(part in name for part in AROUND_ONE)
    wrapped.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = wrapped.eval()(tokens)[0]

    loratools.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")

    merged = type(model).from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens)[0], expected, rtol=1e-5, atol=1e-6)
        assert (whole_model(family)(tokens)[0] - expected).abs().max() > 1e-2


def test_what_peft_writes_has_no_errors_and_no_warnings_of_check(tmp_path: Path) -> None:
    complaints: dict[str, list[str]] = {}
    for number, case in enumerate(CASES):
        report = loratools.check(trained(tmp_path / f"{number}", case), threads=1)
        if report.exit_code:
            complaints[case] = [finding.id for finding in report.findings]

    assert complaints == {}
