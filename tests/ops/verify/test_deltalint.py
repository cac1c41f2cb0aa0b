"""What deltalint finds wrong is called different, what it passes is the same, and what it leaves open is decided."""

from pathlib import Path

import peers
import pytest
import torch
from merge_defects import DEFECTS, KINDS, inputs, write

import loratools

pytestmark = peers.needs("deltalint")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def both(tmp_path: Path) -> tuple[str, str]:
    """The verdict of deltalint, and ours."""
    from deltalint.check import check_merge

    theirs = check_merge(*(str(tmp_path / name) for name in ("base", "style", "merged"))).verdict.value
    return theirs, loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style").verdict


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name, (kind, _) in DEFECTS.items() if kind == "lora"])
def test_defects_of_lora_are_found_by_both(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    weights, parts = inputs(tmp_path, "lora", dtype)
    write(tmp_path, weights, parts, DEFECTS[name][1])

    assert both(tmp_path) == ("FAIL", "different")


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_merge_of_lora_is_passed_by_both(tmp_path: Path, dtype: torch.dtype) -> None:
    weights, parts = inputs(tmp_path, "lora", dtype)
    write(tmp_path, weights, parts, KINDS["lora"])

    theirs, ours = both(tmp_path)

    assert ours == "same"
    assert theirs in ("PASS", "UNKNOWN", "UNVERIFIABLE_FP16")


@pytest.mark.parametrize("dtype", DTYPES)
def test_change_of_an_untouched_weight_is_found_here_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    weights, parts = inputs(tmp_path, "lora", dtype)
    changed = weights | {"model.norm.weight": weights["model.norm.weight"] * 1.5}
    write(tmp_path, changed, parts, KINDS["lora"])

    theirs, ours = both(tmp_path)

    assert ours == "different"
    assert theirs != "FAIL"
