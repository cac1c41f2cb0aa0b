"""A merge that changes nothing says so, with the number, in the report and in its document."""

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
from loratools.errors import InputError

COUNT = len(factories.MODULES)


def remark(base: Path, adapter: Path, out: Path) -> list[str]:
    report = loratools.merge(base, adapter, out)
    assert report.to_dict()["warnings"] == list(report.warnings)
    return [w for w in report.warnings if "equals the base" in w]


def test_untrained_adapter_is_warned_of_with_the_number(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base")
    values = {name: (a, torch.zeros_like(b)) for name, (a, b) in factories.factors(factories.MODULES).items()}

    (warning,) = remark(base, factories.adapter_folder(tmp_path / "style", values=values), tmp_path / "out")

    assert warning.startswith(f"every delta is zero, of {COUNT} of {COUNT} weights: ")


def test_update_that_is_lost_to_rounding_is_warned_of_with_the_number(tmp_path: Path) -> None:
    # 1 + 2^-20 is 1 in bfloat16, which has 8 bits.
    weights = {name: torch.ones_like(w) for name, w in factories.base_weights(dtype=torch.bfloat16).items()}
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    values = {
        name: (torch.full_like(a, 2.0**-14), torch.full_like(b, 2.0**-10))
        for name, (a, b) in factories.factors(factories.MODULES).items()
    }

    (warning,) = remark(base, factories.adapter_folder(tmp_path / "style", values=values), tmp_path / "out")

    assert warning.startswith(f"no weight that was measured changed, of {COUNT} of {COUNT}: ")
    assert "--dtype float32" in warning


def test_adapter_without_updates_is_refused(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    save_file({}, empty / "adapter_model.safetensors")

    with pytest.raises(InputError, match="holds no updates and no replaced tensors"):
        loratools.merge(base, empty, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_line_prints_it_and_the_document_has_it(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base")
    values = {name: (a, torch.zeros_like(b)) for name, (a, b) in factories.factors(factories.MODULES).items()}
    adapter = factories.adapter_folder(tmp_path / "style", values=values)

    done = CliRunner().invoke(verbs, ["merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "--json"])

    assert done.exit_code == 0
    assert "warning: every delta is zero" in done.stderr
    assert any("every delta is zero" in w for w in json.loads(done.stdout)["warnings"])


def test_merge_with_an_effect_has_no_such_warning(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base")

    assert remark(base, factories.adapter_folder(tmp_path / "style"), tmp_path / "out") == []


@pytest.mark.parametrize("dtype", ["F4", "I32"])
def test_weight_of_a_dtype_that_is_not_computed_with_is_named(dtype: str, tmp_path: Path) -> None:
    from loratools.errors import UnsupportedError
    from loratools.storage.arrays import read_array
    from loratools.storage.safetensors_reader import read_header

    header = {"packed": {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, 4 if dtype == "F4" else 32]}}
    text = json.dumps(header).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4 if dtype == "F4" else 32))

    with pytest.raises(UnsupportedError, match=f"'packed' of '{file}' has dtype {dtype}, which is not computed with"):
        read_array(read_header(file).tensors["packed"], "F32")
