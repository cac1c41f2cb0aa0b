"""Other kinds of PEFT's, turned into LoRA by combining and resizing: what PEFT adds to the weights of the results."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from loratools.errors import UnsupportedError
from loratools.ops.combine.verb import combine
from loratools.ops.resize.verb import resize


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(12, 20, bias=False)
        self.down = torch.nn.Linear(20, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(self.up(x))
        return found


def _saved(folder: Path, config: peft.PeftConfig, seed: int = 1) -> Path:
    model = peft.get_peft_model(_Model(), config)  # type: ignore[arg-type]
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


def _deltas(folder: Path) -> dict[str, Tensor]:
    before = {n: p.detach().clone() for n, p in _Model().named_parameters()}
    merged = peft.PeftModel.from_pretrained(_Model(), str(folder)).merge_and_unload()  # type: ignore[arg-type]
    return {n: p.detach() - before[n] for n, p in merged.named_parameters()}


_LOHA = peft.LoHaConfig(r=2, alpha=3, target_modules=["up", "down"])
_LOKR = peft.LoKrConfig(r=2, alpha=3, target_modules=["up", "down"], decompose_factor=4)
_LORA = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["up"])


@pytest.mark.parametrize("config", [_LOHA, _LOKR], ids=["loha", "lokr"])
def test_resized_kind_is_the_nearest_lora(tmp_path: Path, config: peft.PeftConfig) -> None:
    source = _saved(tmp_path / "in", config)

    whole, small = resize(source, tmp_path / "whole", rank=12), resize(source, tmp_path / "small", rank=2)

    wanted, same, found = (_deltas(p) for p in (source, tmp_path / "whole", tmp_path / "small"))
    assert whole.error is not None
    for module in small.modules:
        name = f"{module.name}.weight"
        s = torch.linalg.svdvals(wanted[name].double())
        torch.testing.assert_close(same[name], wanted[name], rtol=1e-4, atol=1e-5)
        assert module.error == pytest.approx(float(s[2:].norm() / s.norm()), abs=1e-5)
        assert float((found[name] - wanted[name]).norm() / wanted[name].norm()) == pytest.approx(module.error, abs=1e-5)


def test_kinds_add(tmp_path: Path) -> None:
    one, two, three = (_saved(tmp_path / str(i), config, seed=i) for i, config in enumerate((_LOHA, _LOKR, _LORA)))

    combine([(one, 0.5), (two, -1.0), three], tmp_path / "out", rank=20)

    a, b, c, found = (_deltas(p) for p in (one, two, three, tmp_path / "out"))
    for name, values in found.items():
        torch.testing.assert_close(values, 0.5 * a[name] - b[name] + c[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["up"], feedforward_modules=[]),
        peft.OFTConfig(oft_block_size=4, target_modules=["up"]),
    ],
    ids=["ia3", "oft"],
)
def test_what_depends_on_the_base_is_refused(tmp_path: Path, config: peft.PeftConfig) -> None:
    source = _saved(tmp_path / "in", config)

    with pytest.raises(UnsupportedError, match=r"\d of \d updates have no delta of their own") as raised:
        resize(source, tmp_path / "out", rank=2)
    assert "depends on the weights of the base" in raised.value.details[0]
    assert not (tmp_path / "out").exists()
