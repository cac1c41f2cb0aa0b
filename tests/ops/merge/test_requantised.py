"""Merging with `requantize`: changed weights in the base's own scheme, everything else byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import factories
import numpy as np
import peers
import pytest
import tiny_models
import torch
from cli_runner import CliRunner
from packed_bases import CASES, COLUMNS, ROWS, UP, base_of
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools import merge
from loratools.checkpoints import open_checkpoint
from loratools.cli import verbs
from loratools.errors import UnsupportedError, UsageError

EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def bits(values: Tensor) -> Tensor:
    return values.contiguous().reshape(-1).view(torch.uint8)


def adapter(folder: Path, *, size: float = 0.02, seed: int = 0) -> tuple[Path, Tensor, Tensor]:
    """An adapter of rank 4 with updates of that size, dW in float64, and A."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(4, COLUMNS, generator=generator), torch.randn(ROWS, 4, generator=generator)
    b *= size / (2 * (b @ a)).std()
    path = factories.adapter_folder(folder, modules={UP: (ROWS, COLUMNS)}, values={UP: (a, b)})
    return path, 2 * b.double() @ a.double(), a.double()


def values_in(folder: Path) -> Tensor:
    return open_checkpoint(folder).weights[f"{UP}.weight"].read().double()


@pytest.mark.parametrize("case", CASES)
def test_scales_and_untouched_weights_keep_their_bytes_and_values_come_closer_to_the_sum(
    tmp_path: Path, case: str
) -> None:
    base = base_of(case, tmp_path / "base")
    path, delta, _ = adapter(tmp_path / "a", size=0.1)

    report = merge(base, path, tmp_path / "out", requantize=True)

    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    changed = {n for n in before if not torch.equal(bits(before[n]), bits(after[n]))}
    assert len(changed) == 1
    assert changed.pop().rpartition(".")[2] in ("weight", "qweight", "weight_packed")
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    error = values_in(tmp_path / "out") - values_in(base) - delta
    assert error.norm() < delta.norm()
    (told,) = report.requantized
    assert told.name == f"{UP}.weight"
    assert told.error_after == pytest.approx(float(error.norm() / delta.norm()), rel=1e-4)
    moved = values_in(tmp_path / "out") - values_in(base)
    assert told.gain == pytest.approx(float((moved * delta).sum() / delta.square().sum()), abs=1e-5)
    assert report.max_error_ratio is not None
    assert report.max_error_ratio <= 1


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["nearest", "stochastic", "adapter"])
def test_an_update_of_zero_changes_no_byte(tmp_path: Path, case: str, mode: Any) -> None:
    base = base_of(case, tmp_path / "base")
    zeros = (torch.randn(4, COLUMNS), torch.zeros(ROWS, 4))
    path = factories.adapter_folder(tmp_path / "a", modules={UP: (ROWS, COLUMNS)}, values={UP: zeros})

    merge(base, path, tmp_path / "out", requantize=True, rounding=mode)

    names = [f / "model.safetensors" for f in (base, tmp_path / "out")]
    before, after = map(load_file, names)
    assert all(torch.equal(bits(before[n]), bits(after[n])) for n in before)


def nf4_levels(stored: dict[str, Tensor]) -> Tensor:
    """The 16 values that each weight could have: (rows, columns, 16), from absmax in blocks of 64 along the rows."""
    absmax = stored[f"{UP}.weight.absmax"].reshape(ROWS, COLUMNS // 64).repeat_interleave(64, dim=1)
    return (absmax[..., None] * stored[f"{UP}.weight.quant_map"]).double()


def test_nearest_is_the_nearest_of_the_sixteen_values_of_nf4(tmp_path: Path) -> None:
    base = base_of("bitsandbytes-nf4-float32", tmp_path / "base")
    path, delta, _ = adapter(tmp_path / "a", size=0.1)

    merge(base, path, tmp_path / "out", requantize=True)

    levels = nf4_levels(load_file(base / "model.safetensors"))
    exact = values_in(base) + delta
    best = (levels - exact[..., None]).abs().min(dim=-1).values
    error = (values_in(tmp_path / "out") - exact).abs()
    assert (error <= best + 1e-6).all()


@pytest.mark.parametrize("mode", ["stochastic", "adapter"])
def test_other_modes_take_one_of_the_two_neighbours_among_the_sixteen_values(tmp_path: Path, mode: Any) -> None:
    base = base_of("bitsandbytes-nf4-float32", tmp_path / "base")
    path, delta, _ = adapter(tmp_path / "a", size=0.1)

    merge(base, path, tmp_path / "out", requantize=True, rounding=mode)

    levels = nf4_levels(load_file(base / "model.safetensors"))
    exact = values_in(base) + delta
    after = values_in(tmp_path / "out")
    below = torch.where(levels <= exact[..., None] + 1e-6, levels, -torch.inf).max(dim=-1).values
    above = torch.where(levels >= exact[..., None] - 1e-6, levels, torch.inf).min(dim=-1).values
    ends = (after == levels.min(dim=-1).values) | (after == levels.max(dim=-1).values)
    assert ((after == below) | (after == above) | (ends & (below.isinf() | above.isinf()))).all()


@peers.needs("bitsandbytes")
def test_bitsandbytes_dequantises_the_result_to_what_is_reported(tmp_path: Path) -> None:
    import bitsandbytes.functional as bnb

    for case in ("bitsandbytes-nf4-nested-bfloat16", "bitsandbytes-fp4-float32"):
        base = base_of(case, tmp_path / case)
        path, delta, _ = adapter(tmp_path / f"a-{case}", size=0.1)
        merge(base, path, tmp_path / f"out-{case}", requantize=True)
        stored = load_file(tmp_path / f"out-{case}" / "model.safetensors")
        parts = {n.removeprefix(f"{UP}.weight."): t for n, t in stored.items() if n.startswith(f"{UP}.weight.")}
        state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))

        theirs = bnb.dequantize_4bit(stored[f"{UP}.weight"], state).double()

        assert torch.equal(theirs, values_in(tmp_path / f"out-{case}"))
        # The distance of the sum to values that are half a step away, or beyond the end of the block.
        assert (theirs - values_in(base) - delta).norm() < delta.norm()


def test_adapter_rounding_keeps_an_update_that_nearest_loses_on_four_bits(tmp_path: Path) -> None:
    base = base_of("bitsandbytes-nf4-float32", tmp_path / "base")
    path, delta, a = adapter(tmp_path / "a", size=0.001)
    x = a.T @ torch.randn(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    errors, gains = {}, {}
    for mode in ("nearest", "stochastic", "adapter"):
        report = merge(base, path, tmp_path / "out", requantize=True, rounding=mode, overwrite=True)  # type: ignore[arg-type]
        error = values_in(tmp_path / "out") - values_in(base) - delta
        errors[mode], gains[mode] = float((error @ x).norm() / (delta @ x).norm()), report.requantized[0].gain
        low = [w for w in report.warnings if "quantised again" in w]
        assert bool(low) == (gains[mode] is not None and gains[mode] < 0.9)  # type: ignore[operator]
        assert all("--dequantize" in w for w in low)

    assert gains["nearest"] is not None
    assert gains["nearest"] < 0.5
    assert errors["adapter"] < 0.6 * errors["nearest"]


def test_the_error_before_is_that_of_a_dequantised_merge(tmp_path: Path) -> None:
    base = base_of("bitsandbytes-nf4-nested-bfloat16", tmp_path / "base")
    path, delta, _ = adapter(tmp_path / "a", size=0.1)

    report = merge(base, path, tmp_path / "out", requantize=True)

    exact = values_in(base) + delta
    before = (exact.float().bfloat16().double() - exact).norm() / delta.norm()
    assert report.requantized[0].error_before == pytest.approx(float(before), rel=1e-3)


def test_experts_in_mxfp4_are_merged_one_by_one(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    experts, outputs, inputs = 3, 12, 64
    packed = {
        f"{EXPERTS}_blocks": torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator,
                                           dtype=torch.uint8),
        f"{EXPERTS}_scales": torch.randint(120, 124, (experts, outputs, inputs // 32), generator=generator,
                                           dtype=torch.uint8),
    }  # fmt: skip
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    base = factories.checkpoint_folder(
        tmp_path / "base", weights={**packed, "model.norm.weight": torch.ones(64)}, config=config
    )
    a = torch.randn(2 * experts, inputs, generator=generator)
    b = torch.randn(outputs, 2 * experts, generator=generator) * 0.02
    folder = tmp_path / "a"
    folder.mkdir()
    module = "base_model.model.model.layers.0.mlp.experts"
    save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_parameters": ["mlp.experts.gate_up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(fields))

    dequantised = merge(base, folder, tmp_path / "floats", dequantize=True, dtype="float32")
    report = merge(base, folder, tmp_path / "out", requantize=True)

    assert dequantised.verified
    exact = load_file(tmp_path / "floats" / "model.safetensors")[EXPERTS]
    checkpoint = open_checkpoint(tmp_path / "out")
    after = checkpoint.weights[EXPERTS].read().float()
    assert after.shape == exact.shape == (experts, inputs, outputs)
    scales = 2.0 ** (packed[f"{EXPERTS}_scales"].float() - 127)
    step = scales.repeat_interleave(32, dim=-1).transpose(1, 2)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6.0])
    levels = torch.cat([values, -values]) * step[..., None]
    assert torch.allclose((after - exact).abs(), (levels - exact[..., None]).abs().min(dim=-1).values, atol=1e-5)
    assert report.max_error_ratio is not None
    assert report.max_error_ratio <= 1


def unpacked(words: Tensor, width: int) -> Tensor:
    """Codes of `width` bits from a little-endian stream of words down each column."""
    single = (words.long()[:, None, :] >> torch.arange(32)[None, :, None]) & 1
    digits = single.reshape(-1, width, words.shape[1])
    return (digits << torch.arange(width)[None, :, None]).sum(dim=1)


@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_gptq_keeps_its_order_its_scales_and_its_zero_points(tmp_path: Path, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    outputs, inputs, groups = 64, 96, 3
    words = {
        "qweight": torch.randint(-(2**31), 2**31, (inputs * width // 32, outputs), generator=generator).int(),
        "qzeros": torch.randint(-(2**31), 2**31, (groups, outputs * width // 32), generator=generator).int(),
        "scales": (torch.rand(groups, outputs, generator=generator) * 0.02 + 0.01).half(),
        "g_idx": torch.arange(inputs)[torch.randperm(inputs, generator=generator)].int() % groups,
    }
    config = {"quantization_config": {"quant_method": "gptq", "bits": width, "desc_act": True}}
    stored = {f"{UP}.{name}": tensor for name, tensor in words.items()}
    base = factories.checkpoint_folder(tmp_path / "base", weights={**stored, "model.norm.weight": torch.ones(96)},
                                       config=config)  # fmt: skip
    a, b = torch.randn(4, inputs, generator=generator), torch.randn(outputs, 4, generator=generator) * 0.004
    path = factories.adapter_folder(tmp_path / "a", modules={UP: (outputs, inputs)}, values={UP: (a, b)})

    merge(base, path, tmp_path / "out", requantize=True)

    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[f"{UP}.{name}"], words[name]) for name in ("qzeros", "scales", "g_idx"))
    zeros = (unpacked(words["qzeros"].T.contiguous(), width) + 1) % 2**width
    order = words["g_idx"].long()
    scale, zero = words["scales"].double()[order], zeros.T.double()[order]
    codes = {name: unpacked(t, width) for name, t in (("before", words["qweight"]), ("after", after[f"{UP}.qweight"]))}
    exact = ((codes["before"] - zero) * scale).half().double() + 2 * (b.double() @ a.double()).T
    best = (exact / scale + zero).round().clamp(0, 2**width - 1)
    # Values are float16, of 11 bits: the nearest of them may be the other of two codes that are about equally far.
    near = ((exact / scale + zero) - best).abs() > 0.35
    assert ((codes["after"] == best) | near).all()
    assert (codes["after"] != codes["before"]).any()


def test_workers_change_no_byte(tmp_path: Path) -> None:
    base = base_of("bitsandbytes-nf4-float32", tmp_path / "base")
    path, _, _ = adapter(tmp_path / "a", size=0.05)
    for name, threads, execution in (("one", 1, "local"), ("two", 2, "local"), ("forked", 2, "forked")):
        merge(
            base, path, tmp_path / name, requantize=True, rounding="adapter", threads=threads, execution=execution
        )  # fmt: skip

    one, two, forked = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two", "forked"))
    assert one == two == forked


@pytest.mark.parametrize("case", ["hqq-4-axis1", "quanto-int8", "torchao-int8"])
def test_a_scheme_that_is_only_read_is_refused_by_name(tmp_path: Path, case: str) -> None:
    base = base_of(case, tmp_path / "base")
    path, _, _ = adapter(tmp_path / "a")

    with pytest.raises(UnsupportedError, match="cannot be quantised again") as caught:
        merge(base, path, tmp_path / "out", requantize=True)

    assert case.partition("-")[0] in caught.value.details[0]
    assert "--dequantize" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_a_replaced_packed_weight_is_refused_by_name(tmp_path: Path) -> None:
    base = base_of("bitsandbytes-int8", tmp_path / "base")
    extra = {f"{UP}.weight": torch.ones(ROWS, COLUMNS)}
    path = factories.adapter_folder(
        tmp_path / "a", modules={}, extra=extra, config={"modules_to_save": ["up_proj"], "target_modules": []}
    )

    with pytest.raises(UnsupportedError, match="cannot be quantised again") as caught:
        merge(base, path, tmp_path / "out", requantize=True)

    assert caught.value.details == (f"{UP}.weight   it is replaced, and not added to",)


def test_floats_and_the_scheme_of_the_base_exclude_each_other(tmp_path: Path) -> None:
    base = base_of("bitsandbytes-int8", tmp_path / "base")
    path, _, _ = adapter(tmp_path / "a")

    with pytest.raises(UsageError, match="exclude each other"):
        merge(base, path, tmp_path / "out", requantize=True, dequantize=True)


def test_a_base_of_floats_has_nothing_to_quantise_again(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base")
    path = factories.adapter_folder(tmp_path / "a")

    report = merge(base, path, tmp_path / "out", requantize=True)

    assert any("--requantize changes nothing" in warning for warning in report.warnings)


def test_the_command_line_plans_and_reports_it(tmp_path: Path) -> None:
    base = base_of("bitsandbytes-nf4-float32", tmp_path / "base")
    path, _, _ = adapter(tmp_path / "a")
    arguments = ["merge", str(base), str(path), "-o", str(tmp_path / "out"), "--requantize"]

    planned = CliRunner().invoke(verbs, [*arguments, "--plan", "--json"])
    table = CliRunner().invoke(verbs, [*arguments, "--plan"])
    done = CliRunner().invoke(verbs, [*arguments, "--json"])
    again = CliRunner().invoke(verbs, [*arguments, "--overwrite"])

    assert [r.exit_code for r in (planned, table, done, again)] == [0, 0, 0, 0], done.output + again.output
    expected = [{"name": f"{UP}.weight", "scheme": "bitsandbytes: nf4"}]
    assert json.loads(planned.stdout)["plan"]["requantized"] == expected
    assert "bitsandbytes: nf4" in table.stdout
    document = json.loads(done.stdout)
    (told,) = document["requantized"]
    assert told.keys() == {"name", "scheme", "error_before", "error_after", "gain"}
    assert told["error_before"] < told["error_after"]
    assert document["targets"] == 1
    assert [t["name"] for t in document["tensors"]] == [f"{UP}.weight"]
    assert "requantized" in again.stderr


@peers.needs("bitsandbytes")
@pytest.mark.parametrize("load", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_transformers_loads_the_result_and_answers_as_the_base_with_the_adapter(
    tmp_path: Path, load: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = tiny_models.llama(vocabulary=99, width=64, inner=128, heads=4, key_heads=2)
    plain.save_pretrained(tmp_path / "float")
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=BitsAndBytesConfig(**load), device_map="cpu", dtype=torch.float32
    )
    quantised.save_pretrained(tmp_path / "base")
    modules = factories.layered(2, {"self_attn.q_proj": (64, 64), "mlp.up_proj": (128, 64)})
    values = {n: (a, b * 0.02) for n, (a, b) in factories.factors(modules).items()}
    path = factories.adapter_folder(tmp_path / "a", modules=modules, values=values)
    tokens = torch.tensor([[3, 14, 15, 92, 65, 35]])

    merge(tmp_path / "base", path, tmp_path / "out", requantize=True, rounding="adapter")

    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map="cpu", dtype=torch.float32)
        plain = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, path)(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu", dtype=torch.float32)
        ours = merged(tokens).logits
    # Within the grid: the merged model is closer to base + adapter than the base is.
    assert (ours - adapted).norm() < (plain - adapted).norm() * 0.7
    assert np.isfinite(ours.numpy()).all()
