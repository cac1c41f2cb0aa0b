"""Experts that files have one by one and layers fused: what is extracted is what PEFT loads, whatever the ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from loratools import formats
from loratools.checkpoints import open_checkpoint
from loratools.ops.extract.verb import extract
from loratools.ops.merge.verb import merge

IDS = torch.tensor([[5, 7, 1, 33, 11, 2]])
pytestmark = pytest.mark.filterwarnings("ignore")
_SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
# Five experts, so that a router has a lower rank than what is asked for; dense layers and shared experts, whose
# projections are called as those of experts.
_MODELS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "mixtral": lambda: transformers.MixtralConfig(**_SIZES, num_local_experts=5),
    "phimoe": lambda: transformers.PhimoeConfig(**_SIZES, num_local_experts=5),
    "olmoe": lambda: transformers.OlmoeConfig(**_SIZES, num_experts=5),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_SIZES, moe_intermediate_size=20, shared_expert_intermediate_size=28, num_experts=5
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_SIZES, moe_intermediate_size=20, num_experts=5, head_dim=6, mlp_only_layers=[0]
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**_SIZES, "num_key_value_heads": 4},
        moe_intermediate_size=20,
        n_routed_experts=5,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=12,
        kv_lora_rank=10,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        v_head_dim=8,
    ),
}


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def _pair(tmp_path: Path, kind: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(_MODELS[kind]()).eval()
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if weight.ndim >= 2 and "embed" not in name:
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    return base, tuned


@pytest.mark.parametrize("kind", _MODELS)
def test_peft_loads_fused_experts_routers_and_shared_experts(tmp_path: Path, kind: str) -> None:
    base, tuned = _pair(tmp_path, kind)
    stored = open_checkpoint(tmp_path / "base").weights
    assert any(".experts.3." in name for name in stored), "the files have experts one by one"

    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "whole", rank=99)
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "small", energy=0.6)

    wanted, far = _logits(tuned), float((_logits(tuned) - _logits(base)).abs().max())
    assert far > 0.05
    assert any(m.name.endswith("experts.gate_up_proj") for m in report.modules)
    assert len({m.rank for m in report.modules}) > 2
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "whole")).eval()  # type: ignore[arg-type]
    torch.testing.assert_close(_logits(loaded), wanted, rtol=1e-4, atol=1e-5)
    merge(tmp_path / "base", tmp_path / "small", tmp_path / "merged")
    ours = _logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval())
    theirs = _logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "small")).eval())  # type: ignore[arg-type]
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_for_another_format_experts_stay_as_the_files_have_them(tmp_path: Path) -> None:
    _pair(tmp_path, "mixtral")

    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "mlx", rank=3, format="mlx")

    assert "model.layers.0.block_sparse_moe.experts.3.w2" in formats.load(tmp_path / "mlx").updates


def test_the_error_of_fused_experts_is_that_of_the_dense_matrices(tmp_path: Path) -> None:
    _pair(tmp_path, "mixtral")
    before, after = (open_checkpoint(tmp_path / side).weights for side in ("base", "tuned"))

    report = extract(tmp_path / "base", tmp_path / "tuned", rank=4)

    (module,) = [m for m in report.modules if m.name == "model.layers.1.mlp.experts.gate_up_proj"]
    names = [[f"model.layers.1.block_sparse_moe.experts.{i}.{part}.weight" for part in ("w1", "w3")] for i in range(5)]
    deltas = torch.stack(
        [torch.cat([after[n].read().double() - before[n].read().double() for n in pair]) for pair in names]
    )
    lost = torch.linalg.svdvals(deltas)[:, 4:].norm()
    assert module.shape == (5, 88, 24)
    assert module.norm == pytest.approx(float(deltas.norm()), rel=1e-6)
    assert module.error == pytest.approx(float(lost / deltas.norm()), rel=1e-5)
