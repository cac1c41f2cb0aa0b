"""Merges that are stored on the grid of a quantisation scheme: done again bit by bit, or held against that grid."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import factories
import peers
import pytest
import torch
from packed_bases import CASES, COLUMNS, FIXTURES, ROWS, UP, base_of
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools

RANK, ALPHA = 4, 8.0


def adapter(folder: Path, *, size: float = 0.1) -> Tensor:
    """Write an adapter whose update has values of that size, and return the update in float64."""
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(RANK, COLUMNS, generator=generator), torch.randn(ROWS, RANK, generator=generator)
    b *= size / (ALPHA / RANK * (b @ a)).std()
    factories.adapter_folder(folder, modules={UP: (ROWS, COLUMNS)}, values={UP: (a, b)}, rank=RANK, alpha=ALPHA)
    return ALPHA / RANK * b.double() @ a.double()


def verified(tmp_path: Path, **options: object) -> loratools.VerifyReport:
    return loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style", **options)  # type: ignore[arg-type]


def codes(report: loratools.VerifyReport) -> list[str]:
    return [finding.code for finding in report.diagnosis]


def test_every_case_of_requantised_merges_is_looked_at() -> None:
    from loratools.checkpoints import open_checkpoint
    from loratools.quantization.common.protocol import Writable

    written = []
    for case in sorted(path.name for path in FIXTURES.iterdir() if (path / "model.safetensors").is_file()):
        quantisation = open_checkpoint(FIXTURES / case).quantisation
        weight = quantisation.weights.get(f"{UP}.weight") if quantisation is not None else None
        if weight is not None and isinstance(weight.parameters, Writable):
            written.append(weight.scheme)

    covered = {q.weights[f"{UP}.weight"].scheme for c in CASES if (q := open_checkpoint(FIXTURES / c).quantisation)}
    assert set(written) == covered


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "adapter", "calibrated"])
def test_requantised_merge_is_told_bit_by_bit_from_its_record(tmp_path: Path, case: str, rounding: str) -> None:
    base = base_of(case, tmp_path / "base")
    adapter(tmp_path / "style")
    x = torch.randn(COLUMNS, 300, generator=torch.Generator().manual_seed(1))
    save_file({UP: x @ x.T}, tmp_path / "moments.safetensors")
    moments = tmp_path / "moments.safetensors" if rounding == "calibrated" else None
    seed = 5 if rounding == "stochastic" else 0
    loratools.merge(
        base, tmp_path / "style", tmp_path / "merged", requantize=True, rounding=rounding, seed=seed, moments=moments  # type: ignore[arg-type]
    )  # fmt: skip

    report = verified(tmp_path, moments=moments)

    assert (report.verdict, codes(report)) == ("same", [])
    (recipe,) = report.recipes
    assert recipe[0].startswith("deltas in float32, loratools with --requantize")
    assert ("--rounding " + rounding in recipe[0]) == (rounding != "nearest")
    assert report.different == ()


@pytest.mark.parametrize("case", CASES)
def test_nearest_is_told_by_the_grid_where_there_is_no_record(tmp_path: Path, case: str) -> None:
    base = base_of(case, tmp_path / "base")
    adapter(tmp_path / "style")
    loratools.merge(base, tmp_path / "style", tmp_path / "merged", requantize=True)
    (tmp_path / "merged" / "loratools.json").unlink()

    report = verified(tmp_path)

    assert report.verdict == "same"
    assert all(t.max_error_ratio is not None and t.max_error_ratio <= 1 for t in report.tensors)


@pytest.mark.parametrize("case", CASES)
def test_other_seed_than_the_recorded_one_is_undecided_on_a_grid(tmp_path: Path, case: str) -> None:
    base = base_of(case, tmp_path / "base")
    adapter(tmp_path / "style")
    loratools.merge(base, tmp_path / "style", tmp_path / "merged", requantize=True, rounding="stochastic", seed=5)
    record = tmp_path / "merged" / "loratools.json"
    record.write_text(record.read_text().replace('"seed": 5', '"seed": 6'))

    report = verified(tmp_path)

    assert (report.verdict, codes(report)) == ("undecided", ["rounded-otherwise"])


def test_calibrated_merge_without_its_moments_is_undecided_and_names_them(tmp_path: Path) -> None:
    base = base_of("bitsandbytes-nf4-float32", tmp_path / "base")
    adapter(tmp_path / "style")
    x = torch.randn(COLUMNS, 300, generator=torch.Generator().manual_seed(1))
    save_file({UP: x @ x.T}, tmp_path / "inputs.safetensors")
    loratools.merge(
        base, tmp_path / "style", tmp_path / "merged", requantize=True, rounding="calibrated",
        moments=tmp_path / "inputs.safetensors",
    )  # fmt: skip

    report = verified(tmp_path)

    assert (report.verdict, codes(report)) == ("undecided", ["moments-absent"])
    assert "inputs.safetensors" in report.diagnosis[0].message
    assert "--moments" in report.diagnosis[0].message


def subtracted(adapter_file: Path) -> None:
    tensors = load_file(adapter_file)
    save_file({n: -t if "lora_B" in n else t for n, t in tensors.items()}, adapter_file)


def with_alpha(alpha: float) -> Callable[[Path], None]:
    def change(adapter_file: Path) -> None:
        config = adapter_file.with_name("adapter_config.json")
        config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": alpha}))

    return change


DEFECTS: dict[str, Callable[[Path], None]] = {"subtracted": subtracted, "applied-twice": with_alpha(2 * ALPHA)}


@pytest.mark.parametrize("case", CASES)
def test_defects_are_told_on_the_grid(tmp_path: Path, case: str) -> None:
    base = base_of(case, tmp_path / "base")
    adapter(tmp_path / "style")
    for name, change in DEFECTS.items():
        shutil.copytree(tmp_path / "style", tmp_path / f"wrong-{name}")
        change(tmp_path / f"wrong-{name}" / "adapter_model.safetensors")
        loratools.merge(base, tmp_path / f"wrong-{name}", tmp_path / "merged", requantize=True, overwrite=True)

        assert codes(verified(tmp_path)) == [name]


def test_model_that_is_the_base_is_told_as_not_applied(tmp_path: Path) -> None:
    base = base_of("bitsandbytes-nf4-float32", tmp_path / "base")
    adapter(tmp_path / "style")
    shutil.copytree(base, tmp_path / "merged")

    report = verified(tmp_path)

    assert (report.verdict, codes(report)) == ("different", ["not-applied"])


def test_change_of_one_packed_byte_is_not_called_the_same(tmp_path: Path) -> None:
    base = base_of("bitsandbytes-nf4-float32", tmp_path / "base")
    adapter(tmp_path / "style")
    loratools.merge(base, tmp_path / "style", tmp_path / "merged", requantize=True)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    tensors[f"{UP}.weight"][700] ^= 0x88
    save_file(tensors, tmp_path / "merged" / "model.safetensors")

    report = verified(tmp_path)

    assert (report.verdict, codes(report)) == ("different", ["unexplained-change"])


def test_scales_that_were_changed_are_not_called_the_same(tmp_path: Path) -> None:
    base = base_of("bitsandbytes-nf4-float32", tmp_path / "base")
    adapter(tmp_path / "style")
    loratools.merge(base, tmp_path / "style", tmp_path / "merged", requantize=True)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    tensors[f"{UP}.weight.absmax"][3] *= 1.5
    save_file(tensors, tmp_path / "merged" / "model.safetensors")

    assert verified(tmp_path).verdict != "same"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rounding", ["nearest", "adapter"])
def test_dequantised_merge_is_the_same(tmp_path: Path, case: str, rounding: str) -> None:
    base = base_of(case, tmp_path / "base")
    adapter(tmp_path / "style")
    loratools.merge(
        base, tmp_path / "style", tmp_path / "merged", dequantize=True, dtype="bfloat16", rounding=rounding  # type: ignore[arg-type]
    )  # fmt: skip

    report = verified(tmp_path)

    assert (report.verdict, codes(report)) == ("same", [])


@peers.needs("bitsandbytes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_that_bitsandbytes_quantised_with_scales_of_its_own_is_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    # As PEFT merges into Linear4bit: dequantised, added, and quantised anew.
    import bitsandbytes.functional as bnb

    base = base_of("bitsandbytes-nf4-float32", tmp_path / "base")
    delta = adapter(tmp_path / "style", size=0.3)
    tensors = load_file(base / "model.safetensors")
    absmax = tensors[f"{UP}.weight.absmax"].repeat_interleave(64)
    nibbles = torch.stack([tensors[f"{UP}.weight"] >> 4, tensors[f"{UP}.weight"] & 15], dim=-1).reshape(-1).long()
    values = (tensors[f"{UP}.weight.quant_map"][nibbles] * absmax).reshape(ROWS, COLUMNS)
    packed, state = bnb.quantize_4bit((values + delta.float()).to(dtype), blocksize=64, quant_type="nf4")
    merged = {**tensors, f"{UP}.weight": packed, f"{UP}.weight.absmax": state.absmax}
    shutil.copytree(base, tmp_path / "merged")
    save_file(merged, tmp_path / "merged" / "model.safetensors")

    report = verified(tmp_path)

    if dtype == torch.float32:
        assert (report.verdict, codes(report)) == ("same", [])
        assert report.recipes == (("deltas in float32, each sum stored as the nearest value of bitsandbytes nf4", 1),)
    else:
        # The values are said to be float32 and were rounded to bfloat16 before: at some edges that decides otherwise.
        assert report.verdict in ("same", "undecided")


@peers.needs("bitsandbytes")
def test_full_precision_base_with_a_merge_that_was_quantised_afterwards_is_the_same(tmp_path: Path) -> None:
    import bitsandbytes.functional as bnb

    generator = torch.Generator().manual_seed(8)
    weights = {f"{UP}.weight": torch.randn(ROWS, COLUMNS, generator=generator) * 0.05}
    factories.checkpoint_folder(tmp_path / "base", weights=weights)
    delta = adapter(tmp_path / "style", size=0.02)
    fixture = load_file(FIXTURES / "bitsandbytes-nf4-float32" / "model.safetensors")
    packed, state = bnb.quantize_4bit(weights[f"{UP}.weight"] + delta.float(), blocksize=64, quant_type="nf4")
    (tmp_path / "merged").mkdir()
    shutil.copy(FIXTURES / "bitsandbytes-nf4-float32" / "config.json", tmp_path / "merged")
    merged = {**fixture, f"{UP}.weight": packed, f"{UP}.weight.absmax": state.absmax}
    save_file(merged, tmp_path / "merged" / "model.safetensors")

    report = verified(tmp_path)

    assert report.verdict == "same"
    assert report.recipes == (("deltas in float32, each sum stored as the nearest value of bitsandbytes nf4", 1),)
