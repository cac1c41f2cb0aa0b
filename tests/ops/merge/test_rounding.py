"""`rounding` of a merge: what each mode keeps of an update that is small beside the spacing of the stored dtype."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import factories
import pytest
import torch
from cli_runner import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools import merge
from loratools.cli import verbs
from loratools.errors import MismatchError, UsageError

UP = "model.layers.0.mlp.up_proj"
SHAPE = (260, 384)
SCALE = 8 / 4
# Of the weights, whose standard deviation is 1: far below half a unit of bfloat16, which is 2^-9 of a weight.
SIZE = 2e-4


def inputs(tmp_path: Path, *, dtype: torch.dtype = torch.bfloat16, size: float = SIZE) -> tuple[Path, Path]:
    weights = factories.base_weights({UP: SHAPE}, dtype=dtype)
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    generator = torch.Generator().manual_seed(9)
    a, b = torch.randn(4, SHAPE[1], generator=generator), torch.randn(SHAPE[0], 4, generator=generator)
    b *= size / (SCALE * (b @ a)).std()
    return base, factories.adapter_folder(tmp_path / "a", modules={UP: SHAPE}, values={UP: (a, b)})


def update(adapter: Path) -> tuple[Tensor, Tensor]:
    """dW in float64, and A."""
    stored = load_file(adapter / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.{UP}.lora_{x}.weight"].double() for x in "AB")
    return SCALE * b @ a, a


def before_and_after(base: Path, out: Path) -> tuple[Tensor, Tensor]:
    name = f"{UP}.weight"
    return (load_file(f / "model.safetensors")[name].double() for f in (base, out))  # type: ignore[return-value]


def gain(base: Path, out: Path, delta: Tensor) -> float:
    before, after = before_and_after(base, out)
    return float(((after - before) * delta).sum() / (delta * delta).sum())


def output_error(base: Path, out: Path, delta: Tensor, x: Tensor) -> float:
    """Error of the outputs for inputs x, as a share of what the update changes there."""
    before, after = before_and_after(base, out)
    return float(((after - before - delta) @ x).norm() / (delta @ x).norm())


def test_nearest_is_the_default_and_a_low_gain_names_adapter_rounding(tmp_path: Path) -> None:
    base, adapter = inputs(tmp_path)

    report = merge(base, adapter, tmp_path / "default")
    merge(base, adapter, tmp_path / "nearest", rounding="nearest")

    delta, _ = update(adapter)
    before, after = before_and_after(base, tmp_path / "default")
    assert torch.equal(after, (before + delta).float().bfloat16().double())
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("default", "nearest")]
    assert files[0] == files[1]
    assert report.gain == pytest.approx(gain(base, tmp_path / "default", delta), abs=1e-6)
    assert report.gain is not None
    assert report.gain < 0.5
    assert any("--rounding adapter" in warning for warning in report.warnings)


def test_a_high_gain_names_nothing(tmp_path: Path) -> None:
    base, adapter = inputs(tmp_path, size=0.2)

    report = merge(base, adapter, tmp_path / "out")

    assert not any("--rounding" in warning for warning in report.warnings)


@pytest.mark.parametrize("mode", ["stochastic", "adapter"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_weight_is_one_of_the_two_neighbours_of_the_sum(tmp_path: Path, mode: Any, dtype: torch.dtype) -> None:
    base, adapter = inputs(tmp_path, dtype=dtype, size=3e-4)

    report = merge(base, adapter, tmp_path / "out", rounding=mode)

    delta, _ = update(adapter)
    before, after = before_and_after(base, tmp_path / "out")
    exact = before + delta
    bits, lowest = (7, -126) if dtype == torch.bfloat16 else (10, -14)
    step = 2.0 ** (torch.floor(torch.log2(exact.abs().clamp(min=2.0**lowest))) - bits)
    below, above = torch.floor(exact / step) * step, torch.ceil(exact / step) * step
    # Sums are formed in float32: one that is within its roundoff of the grid may fall on either side.
    unsure = ((exact / step).round() - exact / step).abs() < 2.0**-12
    assert ((after == below) | (after == above) | unsure).all()
    assert report.max_error_ratio is not None
    assert 0.5 < report.max_error_ratio <= 1
    assert report.rounding == mode


def test_stochastic_rounding_keeps_the_update_in_the_mean(tmp_path: Path) -> None:
    base, adapter = inputs(tmp_path)

    report = merge(base, adapter, tmp_path / "out", rounding="stochastic")

    delta, _ = update(adapter)
    # An error of e (1 - e) ulp^2 in the mean, of an ulp of 2^-8 to 2^-7: a standard error of the gain below 0.05.
    assert gain(base, tmp_path / "out", delta) == pytest.approx(1, abs=0.15)
    assert report.gain == pytest.approx(gain(base, tmp_path / "out", delta), abs=1e-6)


def test_the_mean_over_seeds_is_the_exact_sum(tmp_path: Path) -> None:
    base, adapter = inputs(tmp_path, size=2e-3)
    delta, _ = update(adapter)
    seeds = 24
    total = torch.zeros(SHAPE, dtype=torch.float64)
    for seed in range(seeds):
        merge(base, adapter, tmp_path / "out", rounding="stochastic", seed=seed, overwrite=True, verify=False)
        before, after = before_and_after(base, tmp_path / "out")
        total += after - before - delta

    exact = before + delta
    step = 2.0 ** (torch.floor(torch.log2(exact.abs().clamp(min=2.0**-126))) - 7)
    # The error of one seed is at most a step, its variance at most a quarter of its square.
    spread = (step.square().mean() / 4).sqrt() / seeds**0.5
    assert (total / seeds).mean().abs() < 5 * spread / (SHAPE[0] * SHAPE[1]) ** 0.5
    assert (total / seeds).square().mean().sqrt() < 1.1 * spread


def test_one_seed_gives_one_result_and_another_another(tmp_path: Path) -> None:
    base, adapter = inputs(tmp_path)
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        merge(base, adapter, tmp_path / name, rounding="stochastic", seed=seed)

    one, again, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "again", "two"))
    assert one == again
    assert one != two


def test_adapter_rounding_answers_the_inputs_of_the_adapter_far_better_than_nearest(tmp_path: Path) -> None:
    base, adapter = inputs(tmp_path)
    delta, a = update(adapter)
    x = a.T @ torch.randn(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    errors = {}
    for mode, penalty in (("nearest", None), ("adapter", None), ("adapter", 1 / SHAPE[1])):
        report = merge(
            base, adapter, tmp_path / "out", rounding=mode, penalty=penalty, overwrite=True  # type: ignore[arg-type]
        )  # fmt: skip
        errors[mode, penalty] = output_error(base, tmp_path / "out", delta, x)

    assert errors["nearest", None] > 0.7
    assert errors["adapter", None] < errors["nearest", None] * 0.75
    assert errors["adapter", 1 / SHAPE[1]] < errors["nearest", None] / 5
    assert report.gain is not None
    assert report.gain > 0.9


def test_a_weight_stored_transposed_is_rounded_as_the_layer_that_it_is(tmp_path: Path) -> None:
    """GPT-2 stores (in, out): the inputs of the adapter are along the rows."""
    modules = {"h.0.mlp.c_fc": (260, 384)}
    stored = {name.replace(UP, "h.0.mlp.c_fc"): w for name, w in factories.base_weights({UP: SHAPE}).items()}
    stored["h.0.mlp.c_fc.weight"] = stored["h.0.mlp.c_fc.weight"].T.contiguous()
    weights = {name: w.bfloat16() for name, w in stored.items()}
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    generator = torch.Generator().manual_seed(9)
    a, b = torch.randn(4, 384, generator=generator), torch.randn(260, 4, generator=generator)
    b *= SIZE / (SCALE * (b @ a)).std()
    adapter = factories.adapter_folder(tmp_path / "a", modules=modules, values={"h.0.mlp.c_fc": (a, b)})
    delta = SCALE * b.double() @ a.double()
    x = a.double().T @ torch.randn(4, 50, dtype=torch.float64)
    errors = []
    for mode in ("nearest", "adapter"):
        penalty = None if mode == "nearest" else 1 / 384
        merge(base, adapter, tmp_path / mode, rounding=mode, penalty=penalty)  # type: ignore[arg-type]
        before, after = (load_file(f / "model.safetensors")["h.0.mlp.c_fc.weight"].double().T
                         for f in (tmp_path / "base", tmp_path / mode))  # fmt: skip
        errors.append(float(((after - before - delta) @ x).norm() / (delta @ x).norm()))

    assert errors[1] < errors[0] / 5


def test_rows_of_different_adapters_in_one_weight_each_have_their_own_inputs(tmp_path: Path) -> None:
    """A fused projection: three updates, one below the other."""
    fused = "model.layers.0.self_attn.qkv_proj"
    names = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    sizes = [(120, 384), (60, 384), (60, 384)]
    config = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "num_attention_heads": 12,
              "num_key_value_heads": 6, "hidden_size": 120}  # fmt: skip
    generator = torch.Generator().manual_seed(4)
    weights = {f"{fused}.weight": torch.randn(240, 384, generator=generator).bfloat16()}
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights, config=config)
    values = {}
    for name, (rows, columns) in zip(names, sizes, strict=True):
        a, b = torch.randn(4, columns, generator=generator), torch.randn(rows, 4, generator=generator)
        values[name] = (a, b * SIZE / (SCALE * (b @ a)).std())
    modules = dict(zip(names, sizes, strict=True))
    adapter = factories.adapter_folder(tmp_path / "a", modules=modules, values=values)

    errors: dict[str, list[float]] = {}
    for mode in ("nearest", "adapter"):
        penalty = None if mode == "nearest" else 1 / 384
        merge(base, adapter, tmp_path / mode, rounding=mode, penalty=penalty)  # type: ignore[arg-type]
        after = load_file(tmp_path / mode / "model.safetensors")[f"{fused}.weight"].double()
        first = 0
        for name, (rows, _) in zip(names, sizes, strict=True):
            a, b = (t.double() for t in values[name])
            delta, x = SCALE * b @ a, a.T @ torch.eye(4, dtype=torch.float64)
            error = after[first : first + rows] - weights[f"{fused}.weight"][first : first + rows].double() - delta
            errors.setdefault(mode, []).append(float((error @ x).norm() / (delta @ x).norm()))
            first += rows

    assert all(adapter < nearest / 5 for nearest, adapter in zip(errors["nearest"], errors["adapter"], strict=True))


@pytest.mark.parametrize("mode", ["stochastic", "adapter"])
def test_workers_and_their_kind_change_no_byte(tmp_path: Path, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several units of work in one weight, for which weights of 32 MiB would be needed otherwise."""
    shape = (1900, 384)
    monkeypatch.setattr("loratools.ops.merge.plan._UNIT_BYTES", 600 * 384 * 2)
    generator = torch.Generator().manual_seed(2)
    weights = {f"{UP}.weight": torch.randn(shape, generator=generator).bfloat16()}
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    a, b = torch.randn(2, shape[1], generator=generator), torch.randn(shape[0], 2, generator=generator) * 1e-4
    adapter = factories.adapter_folder(tmp_path / "a", modules={UP: shape}, rank=2, values={UP: (a, b)})

    for name, threads, execution in (("one", 1, "local"), ("three", 3, "local"), ("forked", 2, "forked")):
        merge(base, adapter, tmp_path / name, rounding=mode, threads=threads, execution=execution, verify=False)

    one, three, forked = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "three", "forked"))
    assert one == three == forked


def test_calibrated_rounding_is_best_for_the_inputs_that_were_measured(tmp_path: Path) -> None:
    base, adapter = inputs(tmp_path)
    delta, _ = update(adapter)
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(SHAPE[1], 12, generator=generator) @ torch.randn(12, 400, generator=generator)
    save_file({UP: x @ x.T, f"{UP}.count": torch.tensor(400.0)}, tmp_path / "moments.safetensors")

    errors = {}
    for mode, moments in (("nearest", None), ("adapter", None), ("calibrated", tmp_path / "moments.safetensors")):
        report = merge(
            base, adapter, tmp_path / "out", rounding=mode, moments=moments, overwrite=True  # type: ignore[arg-type]
        )  # fmt: skip
        errors[mode] = output_error(base, tmp_path / "out", delta, x.double())

    assert report.warnings == tuple(w for w in report.warnings if "moments" not in w)
    assert errors["calibrated"] < errors["adapter"] / 2
    assert errors["calibrated"] < errors["nearest"] / 2


def test_a_weight_without_moments_is_named_and_rounded_for_the_adapter(tmp_path: Path) -> None:
    base, adapter = inputs(tmp_path)
    save_file({"model.layers.9.other": torch.eye(3)}, tmp_path / "moments.safetensors")

    report = merge(base, adapter, tmp_path / "out", rounding="calibrated", moments=tmp_path / "moments.safetensors")
    merge(base, adapter, tmp_path / "adapter", rounding="adapter")

    assert any(f"{UP}.weight" in warning and "nothing for 1" in warning for warning in report.warnings)
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "adapter")]
    assert same[0] == same[1]


def test_moments_of_another_size_are_refused_by_name(tmp_path: Path) -> None:
    base, adapter = inputs(tmp_path)
    save_file({UP: torch.eye(383)}, tmp_path / "moments.safetensors")

    with pytest.raises(MismatchError, match="do not fit") as caught:
        merge(base, adapter, tmp_path / "out", rounding="calibrated", moments=tmp_path / "moments.safetensors")

    assert caught.value.details == (f"{UP}.weight   383x383 for 384 inputs",)
    assert not (tmp_path / "out").exists()


def test_moments_that_are_no_square_are_refused_by_name(tmp_path: Path) -> None:
    base, adapter = inputs(tmp_path)
    save_file({UP: torch.ones(4, 5)}, tmp_path / "moments.safetensors")

    with pytest.raises(MismatchError) as caught:
        merge(base, adapter, tmp_path / "out", rounding="calibrated", moments=tmp_path / "moments.safetensors")

    assert UP in caught.value.details[0]


@pytest.mark.parametrize(
    "options",
    [
        {"penalty": 0.1}, {"rounding": "stochastic", "penalty": 0.1}, {"rounding": "adapter", "penalty": -1.0},
        {"rounding": "calibrated"}, {"rounding": "adapter", "moments": "x.safetensors"}, {"rounding": "down"},
    ],
)  # fmt: skip
def test_options_that_contradict_each_other_are_wrong_usage(tmp_path: Path, options: Any) -> None:
    base, adapter = inputs(tmp_path)

    with pytest.raises(UsageError):
        merge(base, adapter, tmp_path / "out", **options)


def test_a_result_in_float32_is_rounded_to_nearest_and_that_is_said(tmp_path: Path) -> None:
    base, adapter = inputs(tmp_path, dtype=torch.float32)

    report = merge(base, adapter, tmp_path / "out", rounding="adapter")
    merge(base, adapter, tmp_path / "nearest")

    assert any("changes nothing" in warning for warning in report.warnings)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "nearest")]
    assert files[0] == files[1]


def test_an_update_without_factors_is_rounded_to_nearest_and_named(tmp_path: Path) -> None:
    base, _ = inputs(tmp_path)
    adapter = tmp_path / "ia3"
    adapter.mkdir()
    save_file({f"base_model.model.{UP}.ia3_l": torch.full((SHAPE[0], 1), 1.001)}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "IA3", "target_modules": ["up_proj"], "feedforward_modules": []}
    (adapter / "adapter_config.json").write_text(json.dumps(config))

    report = merge(base, adapter, tmp_path / "out", rounding="adapter")
    merge(base, adapter, tmp_path / "nearest")

    assert any(f"{UP}.weight" in w and "rounded to nearest" in w for w in report.warnings)
    values = [load_file(tmp_path / name / "model.safetensors")[f"{UP}.weight"] for name in ("out", "nearest")]
    # Ties may go either way.
    assert (values[0] != values[1]).float().mean() < 0.01


def test_the_command_line_has_the_same_options(tmp_path: Path) -> None:
    base, adapter = inputs(tmp_path)
    arguments = ["merge", str(base), str(adapter), "--rounding", "adapter", "--lambda", "0.01", "--json"]

    planned = CliRunner().invoke(verbs, [*arguments, "-o", str(tmp_path / "cli"), "--plan"])
    done = CliRunner().invoke(verbs, [*arguments, "-o", str(tmp_path / "cli")])
    merge(base, adapter, tmp_path / "api", rounding="adapter", penalty=0.01)

    assert (planned.exit_code, done.exit_code) == (0, 0), planned.output + done.output
    assert json.loads(planned.stdout)["plan"]["rounding"] == "adapter"
    assert json.loads(done.stdout)["rounding"] == "adapter"
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("cli", "api")]
    assert files[0] == files[1]
