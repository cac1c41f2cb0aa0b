"""Each defect that `verify` claims to tell, made on purpose by float64 arithmetic, is told by its name and no other."""

from pathlib import Path

import factories
import pytest
import torch
from merge_defects import ALPHA, DEFECTS, KINDS, MODULES, RANK, SCALE, SQUARE, inputs, plain, times, write

import loratools


def codes(tmp_path: Path) -> list[str]:
    report = loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style")
    assert report.exit_code == {"same": 0, "different": 1, "undecided": 3}[report.verdict]
    return [finding.code for finding in report.diagnosis]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_told_by_its_name(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    kind, merge = DEFECTS[name]
    weights, parts = inputs(tmp_path, kind, dtype)
    write(tmp_path, weights, parts, merge)

    assert codes(tmp_path) == [name.partition(",")[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_right_merge_has_no_defect(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    weights, parts = inputs(tmp_path, kind, dtype)
    write(tmp_path, weights, parts, KINDS[kind])

    assert codes(tmp_path) == []


def test_delta_that_was_transposed_is_told_for_the_square_weight_alone(tmp_path: Path) -> None:
    weights, parts = inputs(tmp_path, "lora", torch.float32)
    write(tmp_path, weights, parts, plain)
    a, b, _ = parts[SQUARE]
    merged = {f"{n}.weight": plain(weights[f"{n}.weight"].double(), *parts[n]).float() for n in MODULES}
    merged[f"{SQUARE}.weight"] = (weights[f"{SQUARE}.weight"].double() + SCALE * (b @ a).T).float()
    factories.checkpoint_folder(tmp_path / "merged", weights={**weights, **merged})

    report = loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style")

    assert [(f.code, f.names) for f in report.diagnosis] == [("transposed", (f"{SQUARE}.weight",))]


def test_rslora_that_was_ignored_is_told(tmp_path: Path) -> None:
    weights, parts = inputs(tmp_path, "lora", torch.float32)
    pairs = {n: (a.float(), b.float()) for n, (a, b, _) in parts.items()}
    factories.adapter_folder(tmp_path / "style", values=pairs, rank=RANK, alpha=ALPHA, config={"use_rslora": True})
    write(tmp_path, weights, parts, plain)

    assert codes(tmp_path) == ["rslora-ignored"]


def test_of_two_adapters_the_one_that_is_missing_is_named(tmp_path: Path) -> None:
    weights, parts = inputs(tmp_path, "lora", torch.float32)
    write(tmp_path, weights, parts, plain)
    factories.adapter_folder(
        tmp_path / "facts", values={n: (a * 0.1, b * 0.1) for n, (a, b) in factories.factors(MODULES, seed=8).items()}
    )

    report = loratools.verify(tmp_path / "merged", tmp_path / "base", [tmp_path / "style", tmp_path / "facts"])

    assert [finding.code for finding in report.diagnosis] == ["adapter-weight"]
    assert "facts' has not been applied" in report.diagnosis[0].message
    assert all(t.weights == pytest.approx((1, 0), abs=1e-4) for t in report.tensors)


def test_change_below_the_spacing_of_the_dtype_is_undecided(tmp_path: Path) -> None:
    # All between 1 and 2, where numbers are 2^-7 apart.
    weights = {n: (1 + t.abs() % 1).bfloat16() for n, t in factories.base_weights(MODULES).items()}
    factories.checkpoint_folder(tmp_path / "base", weights=weights)
    tiny = {n: (a * 1e-4, b * 1e-4) for n, (a, b) in factories.factors(MODULES, rank=RANK, seed=4).items()}
    factories.adapter_folder(tmp_path / "style", values=tiny, rank=RANK, alpha=ALPHA)
    factories.checkpoint_folder(tmp_path / "merged", weights=weights)

    report = loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style")

    assert (report.verdict, [f.code for f in report.diagnosis]) == ("undecided", ["nothing-survived"])


def test_sample_of_a_right_merge_is_undecided_and_of_a_wrong_one_different(tmp_path: Path) -> None:
    weights, parts = inputs(tmp_path, "lora", torch.float32)
    write(tmp_path, weights, parts, plain)
    arguments = tmp_path / "merged", tmp_path / "base", tmp_path / "style"

    right = loratools.verify(*arguments, sample=0.2)
    write(tmp_path, weights, parts, times(2))
    wrong = loratools.verify(*arguments, sample=0.2)

    assert (right.verdict, [f.code for f in right.diagnosis]) == ("undecided", ["sampled"])
    assert (wrong.verdict, wrong.diagnosis[0].code) == ("different", "applied-twice")
