"""Merges whose values depend on settings: made again from the record, or from what the caller gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import factories
import pytest
import torch
from cli_runner import CliRunner
from safetensors.torch import save_file

import loratools
from loratools.cli import verbs

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
MODULES = {Q: (40, 128), UP: (24, 192)}
ONCE = "deltas in float32, the sum rounded once"


def inputs(tmp_path: Path, *, size: float = 0.02, dtype: torch.dtype = torch.bfloat16) -> None:
    factories.checkpoint_folder(tmp_path / "base", weights=factories.base_weights(MODULES, dtype=dtype))
    values = {n: (a, b * size) for n, (a, b) in factories.factors(MODULES).items()}
    factories.adapter_folder(tmp_path / "style", modules=MODULES, values=values)


def moments(path: Path, *, seed: int = 1) -> Path:
    generator = torch.Generator().manual_seed(seed)
    inputs_of = {name: torch.randn(columns, 300, generator=generator) for name, (_, columns) in MODULES.items()}
    save_file({name: x @ x.T for name, x in inputs_of.items()}, path)
    return path


def merge(tmp_path: Path, **options: Any) -> None:
    loratools.merge(tmp_path / "base", tmp_path / "style", tmp_path / "merged", overwrite=True, **options)


def verified(tmp_path: Path, **options: Any) -> loratools.VerifyReport:
    return loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style", **options)


def codes(report: loratools.VerifyReport) -> list[str]:
    return [finding.code for finding in report.diagnosis]


@pytest.mark.parametrize("size", [0.02, 1e-4], ids=["large", "below-the-spacing"])
@pytest.mark.parametrize("penalty", [None, 0.03])
@pytest.mark.parametrize("rounding", ["adapter", "calibrated"])
def test_roundings_with_a_penalty_are_made_again_from_the_record(
    tmp_path: Path, rounding: str, penalty: float | None, size: float
) -> None:
    inputs(tmp_path, size=size)
    file = moments(tmp_path / "inputs.safetensors") if rounding == "calibrated" else None
    merge(tmp_path, rounding=rounding, penalty=penalty, moments=file)

    report = verified(tmp_path, moments=file)

    assert (report.verdict, codes(report)) == ("same", [])
    used = penalty if penalty is not None else {"adapter": 0.25, "calibrated": 0.01}[rounding]
    assert report.recipes == ((f"deltas in float32, loratools with --rounding {rounding} (penalty {used:g})", 2),)


@pytest.mark.parametrize("size", [0.02, 1e-4], ids=["large", "below-the-spacing"])
def test_calibrated_merge_without_its_moments_is_undecided_and_names_the_file(tmp_path: Path, size: float) -> None:
    inputs(tmp_path, size=size)
    merge(tmp_path, rounding="calibrated", moments=moments(tmp_path / "inputs.safetensors"))

    report = verified(tmp_path)

    assert (report.verdict, codes(report)) == ("undecided", ["moments-absent"])
    assert "inputs.safetensors" in report.diagnosis[0].message


def test_other_moments_than_the_recorded_ones_are_said_and_do_not_make_it_the_same(tmp_path: Path) -> None:
    inputs(tmp_path)
    merge(tmp_path, rounding="calibrated", moments=moments(tmp_path / "inputs.safetensors"))

    report = verified(tmp_path, moments=moments(tmp_path / "other.safetensors", seed=2))

    assert report.verdict == "undecided"
    assert any("other.safetensors" in warning and "hash" in warning for warning in report.warnings)


def test_defects_of_a_merge_with_a_recorded_rounding_are_told(tmp_path: Path) -> None:
    inputs(tmp_path)
    loratools.merge(
        tmp_path / "base", [(tmp_path / "style", -1.0)], tmp_path / "merged", rounding="adapter", overwrite=True
    )

    report = verified(tmp_path)

    assert (report.verdict, codes(report)) == ("different", ["subtracted"])


@pytest.mark.parametrize("name", ["subtracted", "applied-twice"])
def test_defects_of_updates_below_the_spacing_of_the_dtype_are_told_by_every_value(tmp_path: Path, name: str) -> None:
    inputs(tmp_path, size=3e-4)
    weight = {"subtracted": -1.0, "applied-twice": 2.0}[name]
    loratools.merge(tmp_path / "base", [(tmp_path / "style", weight)], tmp_path / "merged")

    report = verified(tmp_path)

    assert (report.verdict, codes(report)) == ("different", [name])


@pytest.mark.parametrize("trained_on", ["nf4", "fp4", "int8", "nested"])
@pytest.mark.parametrize("rounding", ["nearest", "adapter"])
def test_merge_into_what_training_saw_is_made_again_from_the_record(
    tmp_path: Path, trained_on: str, rounding: str
) -> None:
    inputs(tmp_path)
    scheme: str | Path = trained_on
    if trained_on == "nested":
        fields = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        scheme = tmp_path / "training.json"
        scheme.write_text(json.dumps({"quant_method": "bitsandbytes", "bnb_4bit_blocksize": 128, **fields}))
    merge(tmp_path, trained_on=scheme, rounding=rounding)

    report = verified(tmp_path)

    named = "nf4, double quantisation" if trained_on == "nested" else trained_on
    assert (report.verdict, codes(report)) == ("same", [])
    assert report.recipes[0][0].endswith(f"added to what {named} makes of the base")


def test_training_scheme_is_given_where_there_is_no_record(tmp_path: Path) -> None:
    inputs(tmp_path)
    merge(tmp_path, trained_on="nf4")
    (tmp_path / "merged" / "loratools.json").unlink()

    without, given = verified(tmp_path), verified(tmp_path, trained_on="nf4")

    assert (without.verdict, codes(without)) == ("different", ["training-values"])
    assert "nf4" in without.diagnosis[0].message
    assert (given.verdict, codes(given)) == ("same", [])


def test_merge_into_the_base_in_place_of_what_training_saw_is_told(tmp_path: Path) -> None:
    inputs(tmp_path)
    merge(tmp_path)

    report = verified(tmp_path, trained_on="nf4")

    assert (report.verdict, codes(report)) == ("different", ["training-values-ignored"])


def test_record_of_one_file_is_in_its_header(tmp_path: Path) -> None:
    inputs(tmp_path)
    base, merged = tmp_path / "base" / "model.safetensors", tmp_path / "merged.safetensors"
    (tmp_path / "base" / "config.json").unlink()
    file = moments(tmp_path / "inputs.safetensors")
    loratools.merge(base, tmp_path / "style", merged, rounding="calibrated", moments=file)

    assert loratools.verify(merged, base, tmp_path / "style", moments=file).verdict == "same"
    assert codes(loratools.verify(merged, base, tmp_path / "style")) == ["moments-absent"]


def test_base_in_float32_and_a_merge_that_is_stored_narrower_are_made_again(tmp_path: Path) -> None:
    inputs(tmp_path, dtype=torch.float32)
    merge(tmp_path, dtype="bfloat16", rounding="stochastic", seed=7)

    report = verified(tmp_path)

    assert report.verdict == "same"
    assert report.recipes == (("deltas in float32, loratools with --rounding stochastic (seed 7)", 2),)


def test_command_line_takes_moments_and_the_training_scheme(tmp_path: Path) -> None:
    inputs(tmp_path)
    file = moments(tmp_path / "inputs.safetensors")
    merge(tmp_path, rounding="calibrated", moments=file, trained_on="nf4")
    (tmp_path / "merged" / "loratools.json").unlink()
    given = [str(tmp_path / "merged"), str(tmp_path / "style"), "--base", str(tmp_path / "base"), "--json"]

    right = CliRunner().invoke(verbs, ["verify", *given, "--moments", str(file), "--trained-on", "nf4"])
    without = CliRunner().invoke(verbs, ["verify", *given, "--moments", str(file)])

    assert (right.exit_code, json.loads(right.stdout)["verdict"]) == (0, "same")
    assert without.exit_code in (1, 3)
