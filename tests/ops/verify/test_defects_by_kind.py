"""Defects that make sense for every kind of update are told for each, with deltas that PEFT computes."""

from __future__ import annotations

from pathlib import Path

import factories
import peft
import pytest
import torch
from torch import Tensor, nn

import loratools

MODULES = {"layers.0.self_attn.q_proj": (40, 24), "layers.0.mlp.down_proj": (24, 56)}
TARGETS = ["q_proj", "down_proj"]
KINDS: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, init_lora_weights=False),
    "rslora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, init_lora_weights=False, use_rslora=True),
    "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=TARGETS, init_weights=False),
    "lokr": peft.LoKrConfig(r=3, alpha=5, target_modules=TARGETS, init_weights=False),
    "ia3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"], init_ia3_weights=False),
    "oft": peft.OFTConfig(oft_block_size=8, target_modules=TARGETS, init_weights=False, use_cayley_neumann=False),
}
# What the delta is multiplied with, by the name of the defect.
DEFECTS = {"not-applied": 0.0, "subtracted": -1.0, "applied-twice": 2.0, "adapter-weight": 0.8}


class Block(nn.Module):
    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, (rows, columns) in MODULES.items():
            parent: nn.Module = self
            *parts, last = name.split(".")
            for part in parts:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            layer = nn.Linear(columns, rows, bias=False)
            layer.weight.data = weights[f"{name}.weight"].clone()
            parent.add_module(last, layer)

    def forward(self) -> None:
        raise NotImplementedError


def inputs(tmp_path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write base and adapter; the weights of the base, and those that PEFT merges."""
    generator = torch.Generator().manual_seed(6)
    weights = {f"{n}.weight": torch.randn(*shape, generator=generator) * 0.05 for n, shape in MODULES.items()}
    factories.checkpoint_folder(tmp_path / "base", weights=weights)
    torch.manual_seed(7)
    model = peft.get_peft_model(Block(weights), KINDS[kind])  # type: ignore[arg-type]
    for parameter in model.parameters():
        if parameter.requires_grad:
            shift = 1.0 if kind == "ia3" else 0.0
            parameter.data = shift + torch.randn(parameter.shape, generator=generator) * 0.3
    model.save_pretrained(str(tmp_path / "style"))
    merged = model.merge_and_unload()
    return weights, {n: t.contiguous() for n, t in merged.state_dict().items()}


def codes(tmp_path: Path, merged: dict[str, Tensor]) -> list[str]:
    factories.checkpoint_folder(tmp_path / "merged", weights=merged)
    report = loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style")
    return [finding.code for finding in report.diagnosis]


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("kind", KINDS)
def test_defect_is_told_by_its_name_for_every_kind(tmp_path: Path, kind: str, defect: str) -> None:
    weights, right = inputs(tmp_path, kind)
    times = DEFECTS[defect]

    wrong = {n: (w.double() + times * (right[n].double() - w.double())).float() for n, w in weights.items()}

    assert set(codes(tmp_path, wrong)) == {defect}


@pytest.mark.parametrize("kind", KINDS)
def test_merge_by_peft_is_not_called_different_for_any_kind(tmp_path: Path, kind: str) -> None:
    _, right = inputs(tmp_path, kind)

    # The rotations of OFT are solutions of float32 systems, whose error no order of sums explains.
    allowed = ([], ["rounded-otherwise"]) if kind == "oft" else ([],)
    assert codes(tmp_path, right) in allowed
