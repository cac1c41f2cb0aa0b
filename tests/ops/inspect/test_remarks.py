"""What inspect remarks of adapters that were saved without all of their values."""

from __future__ import annotations

import json
from pathlib import Path

import factories
import pytest
import torch
from cli_runner import CliRunner
from safetensors.torch import save_file

import loratools
from loratools.cli import verbs

Q = "model.layers.0.self_attn.q_proj"


def entry(path: Path, **options: bool) -> loratools.AdapterEntry:
    (only,) = loratools.inspect(path, **options).sources  # type: ignore[arg-type]
    assert isinstance(only, loratools.AdapterEntry)
    return only


def test_adapter_without_tensors_says_so(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({}, tmp_path / "adapter_model.safetensors")

    assert entry(tmp_path).warnings == (f"'{tmp_path}' holds no tensors: nothing was trained, or nothing was saved",)
    shown = CliRunner().invoke(verbs, ["inspect", str(tmp_path)])
    assert "holds no tensors" in shown.stdout


def test_replaced_weight_of_shape_0_is_named(tmp_path: Path) -> None:
    folder = factories.adapter_folder(
        tmp_path / "style", extra={"lm_head.weight": torch.zeros(0)}, config={"modules_to_save": ["lm_head"]}
    )

    (warning,) = [w for w in entry(folder).warnings if "without any values" in w]
    assert warning.startswith("1 replaced weight without any values: lm_head.weight; ")


def test_sound_adapter_has_no_such_remark(tmp_path: Path) -> None:
    one = entry(factories.adapter_folder(tmp_path / "style"), values=True)

    assert (one.warnings, one.value_warnings, one.mostly_zero) == ((), (), ())


@pytest.mark.parametrize(("zeros", "is_remarked"), [(5, False), (6, True), (9, True)])
def test_b_of_mostly_zero_rows_is_remarked(tmp_path: Path, zeros: int, is_remarked: bool) -> None:
    values = factories.factors({Q: (10, 6)})
    values[Q][1][1 : 1 + zeros] = 0
    folder = factories.adapter_folder(tmp_path / "style", values=values)

    one = entry(folder, values=True)

    assert one.modules[0].values is not None
    assert one.modules[0].values.zero_rows == zeros
    assert one.mostly_zero == ((Q,) if is_remarked else ())
    warnings = CliRunner().invoke(verbs, ["inspect", str(folder), "--values"]).stdout
    assert ("most rows of B are zeros in 1 module" in warnings) == is_remarked


def test_b_of_zeros_alone_is_untrained_and_not_remarked_twice(tmp_path: Path) -> None:
    values = factories.factors({Q: (10, 6)})
    values[Q][1][:] = 0
    one = entry(factories.adapter_folder(tmp_path / "style", values=values), values=True)

    assert (one.untrained, one.mostly_zero) == ((Q,), ())
