"""What deltalint finds wrong is called different, what it passes is the same, and what it leaves open is decided."""

from pathlib import Path

import peers
import pytest
import torch
from merge_defects import DEFECTS, KINDS, RANK, SCALE, Merge, inputs, plain, some_ranks, times, write
from torch import Tensor

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


def transposed(w: Tensor, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
    delta = plain(w, a, b, m) - w
    return w + (delta.T if delta.shape[0] == delta.shape[1] else delta)


def other_change(w: Tensor, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
    return DEFECTS["other-change"][1](w, a, b, m)


def only_in(square: bool, wrong: Merge) -> Merge:
    """The defect in the square weight alone, or in all others."""
    return lambda w, a, b, m: (wrong if (w.shape[0] == w.shape[1]) == square else plain)(w, a, b, m)


# What the documentation of deltalint says that it tells, by its own names, and what it is called here.
THIRTEEN: dict[str, tuple[Merge, str]] = {
    "DELTA_NOT_APPLIED": (times(0), "not-applied"),
    "DELTA_NOT_APPLIED in one layer": (only_in(True, times(0)), "not-applied"),
    "SIGN_FLIPPED": (times(-1), "subtracted"),
    "SIGN_FLIPPED in all layers but one": (only_in(False, times(-1)), "subtracted"),
    "SCALING_MISMATCH missing": (times(1 / SCALE), "scale-ignored"),
    "SCALING_MISMATCH doubled": (times(SCALE), "scale-twice"),
    "SCALING_MISMATCH rslora": (times(RANK**0.5), "rslora-assumed"),
    "half_strength": (times(0.5), "adapter-weight"),
    "1.001x_strength": (times(1.001), "adapter-weight"),
    "TRANSPOSED_DELTA": (transposed, "transposed"),
    "PARTIAL_RANK": (some_ranks, "ranks-missing"),
    "UNEXPLAINED": (other_change, "other-change"),
    "applied twice": (times(2), "applied-twice"),
}


@pytest.mark.parametrize("name", THIRTEEN)
def test_each_defect_of_its_documentation_is_found_and_named_here(tmp_path: Path, name: str) -> None:
    merge, code = THIRTEEN[name]
    weights, parts = inputs(tmp_path, "lora", torch.float32)
    write(tmp_path, weights, parts, merge)

    report = loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style")

    # In float32 deltalint tolerates a thousandth, which is told here.
    assert both(tmp_path) == ("PASS" if name == "1.001x_strength" else "FAIL", "different")
    assert [finding.code for finding in report.diagnosis] == [code]
