"""What `combine` and `resize` write: the inputs' own format where it can hold the result, otherwise PEFT, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import loratools
from loratools.adapter import Adapter
from loratools.errors import UnsupportedError

FIXTURES = Path(__file__).parents[3] / "fixtures"


def with_whole_weights() -> Adapter:
    """An adapter that says it is of mlx-lm, with replaced weights, which mlx-lm has no place for."""
    adapter = loratools.load(FIXTURES / "llama-tied-tiny-tokens")
    assert adapter.replacements
    return replace(adapter, format="mlx")


def test_what_the_format_of_the_input_cannot_hold_is_written_as_peft_and_that_is_said(tmp_path: Path) -> None:
    adapter = with_whole_weights()
    report = loratools.resize(adapter, tmp_path / "small", rank=2)
    assert loratools.load(tmp_path / "small").format == "peft"
    reasons = [w for w in report.warnings if w.startswith("written as peft, as mlx cannot hold the result")]
    assert len(reasons) == 1
    assert next(iter(sorted(adapter.replacements))) in reasons[0]
    combined = loratools.combine([(adapter, 0.5)], tmp_path / "half")
    assert loratools.load(tmp_path / "half").format == "peft"
    assert any("mlx cannot hold the result" in w for w in combined.warnings)


def test_a_plan_says_the_same(tmp_path: Path) -> None:
    report = loratools.resize(with_whole_weights(), tmp_path / "small", rank=2, plan=True)
    assert any("mlx cannot hold the result" in w for w in report.warnings)
    assert list(tmp_path.iterdir()) == []


def test_a_format_that_is_asked_for_is_written_or_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="cannot be written as mlx"):
        loratools.resize(with_whole_weights(), tmp_path / "small", rank=2, format="mlx")
    assert list(tmp_path.iterdir()) == []


def test_what_the_format_can_hold_stays_in_it(tmp_path: Path) -> None:
    loratools.convert(FIXTURES / "llama-tiny-science", tmp_path / "mlx", format="mlx", base=FIXTURES / "llama-tiny")
    report = loratools.resize(tmp_path / "mlx", tmp_path / "small", rank=2)
    assert loratools.load(tmp_path / "small").format == "mlx"
    assert not any("written as" in w for w in report.warnings)


def test_under_the_name_of_a_file_no_folder_takes_its_place(tmp_path: Path) -> None:
    stored = {"lora_unet_single_blocks_0_linear2.lora_down.weight": torch.randn(2, 240)}
    stored["lora_unet_single_blocks_0_linear2.lora_up.weight"] = torch.randn(48, 2)
    save_file(stored, tmp_path / "kohya.safetensors")
    adapter = loratools.load(tmp_path / "kohya.safetensors")
    whole = loratools.load(FIXTURES / "llama-tied-tiny-tokens").replacements
    mixed = replace(adapter, replacements=whole)
    with pytest.raises(UnsupportedError, match="cannot be written as kohya"):
        loratools.resize(mixed, tmp_path / "small.safetensors", rank=1)
    assert not (tmp_path / "small.safetensors").exists()
