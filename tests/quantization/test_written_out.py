"""Schemes that no package writes or reads on a CPU, against float64 arithmetic written out from their specification."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratools.checkpoints import Checkpoint, open_checkpoint

# Outputs, inputs, and inputs in a group: all different, the outputs no multiple of what is packed in a word of 3 bits.
OUT, IN, GROUP = 64, 96, 32
NAME = "model.layers.0.mlp.up_proj"


def opened(folder: Path, parts: dict[str, Tensor], config: dict[str, object] | None = None) -> Checkpoint:
    save_file({f"{NAME}.{n}": t.contiguous() for n, t in parts.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return open_checkpoint(folder)


def assert_values(checkpoint: Checkpoint, expected: Tensor, dtype: torch.dtype) -> None:
    """The one weight has these float64 values, rounded once to the dtype; rows read apart too."""
    (name,) = checkpoint.weights
    assert name == f"{NAME}.weight"
    weight, rows = checkpoint.weights[name], expected.shape[0]
    assert torch.equal(weight.read(), expected.to(dtype))
    pieces = [weight.read_rows(start, min(start + 7, rows)) for start in range(0, rows, 7)]
    assert torch.equal(torch.cat(pieces), expected.to(dtype))


def in_words(codes: Tensor, bits: int) -> Tensor:
    """Integers of one column each, as words of 32 bits: value i begins at bit i * bits."""
    count, columns = codes.shape
    words = torch.zeros(count * bits // 32, columns, dtype=torch.int64)
    for i in range(count):
        for bit in range(bits):
            place = i * bits + bit
            words[place // 32] |= ((codes[i] >> bit) & 1) << (place % 32)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def gptq_parts(bits: int, symmetric: bool, stored_zero: int, order: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
    """A layer, and its values in float64. `stored_zero` is what is added to a zero point when it is stored."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (IN, OUT), generator=generator)
    zeros = torch.randint(0, 1 << bits, (IN // GROUP, OUT), generator=generator)
    if symmetric:
        zeros = torch.full_like(zeros, 1 << (bits - 1))
    scales = (torch.rand(IN // GROUP, OUT, generator=generator) * 0.02 + 0.01).half()
    groups = order if order is not None else torch.arange(IN) // GROUP
    values = (codes - zeros[groups]).double() * scales[groups].double()
    parts = {
        "qweight": in_words(codes, bits),
        "qzeros": in_words(((zeros + stored_zero) % (1 << bits)).T, bits).T,
        "scales": scales,
        "g_idx": groups.to(torch.int32),
    }
    return parts, values.T


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_is_code_less_zero_point_times_scale(tmp_path: Path, bits: int, symmetric: bool, version: str) -> None:
    parts, values = gptq_parts(bits, symmetric, -1 if version == "gptq" else 0, None)
    config = {"quantization_config": {"quant_method": "gptq", "bits": bits, "checkpoint_format": version}}

    assert_values(opened(tmp_path, parts, config), values, torch.float16)


def test_gptq_without_a_word_on_its_version_stores_zero_points_less_one(tmp_path: Path) -> None:
    parts, values = gptq_parts(4, False, -1, None)
    del parts["g_idx"]

    assert_values(opened(tmp_path, parts), values, torch.float16)


def test_gptq_in_an_order_of_its_own_takes_the_group_of_each_input(tmp_path: Path) -> None:
    order = (torch.arange(IN) // GROUP)[torch.randperm(IN, generator=torch.Generator().manual_seed(1))]
    parts, values = gptq_parts(4, False, -1, order)

    assert_values(opened(tmp_path, parts), values, torch.float16)


def test_gptq_of_more_rows_than_are_unpacked_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratools.quantization.gptq._BLOCK_VALUES", 1)
    parts, values = gptq_parts(3, False, -1, None)

    assert_values(opened(tmp_path, parts), values, torch.float16)


def test_awq_has_its_outputs_in_the_order_0_2_4_6_1_3_5_7(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    codes, zeros = (torch.randint(0, 16, (rows, OUT), generator=generator) for rows in (IN, IN // GROUP))
    scales = (torch.rand(IN // GROUP, OUT, generator=generator) * 0.02).half()

    def packed(values: Tensor) -> Tensor:
        ordered = values.reshape(len(values), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(len(values), -1)
        return in_words(ordered.T, 4).T

    groups = torch.arange(IN) // GROUP
    values = (codes - zeros[groups]).double() * scales[groups].double()

    checkpoint = opened(tmp_path, {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales})

    assert_values(checkpoint, values.T, torch.float16)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nvfp4_of_modelopt_multiplies_by_both_scales(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (OUT, IN), generator=generator)
    scales = (torch.rand(OUT, IN // 16, generator=generator) * 100).to(torch.float8_e4m3fn)
    # A power of two, so that float32 is exact but for the last rounding.
    overall = torch.tensor(2.0**-11)
    values = E2M1[codes] * scales.double().repeat_interleave(16, 1) * overall.double()
    parts = {
        "weight": (codes[:, ::2] | (codes[:, 1::2] << 4)).to(torch.uint8),
        "weight_scale": scales,
        "weight_scale_2": overall,
        "input_scale": torch.tensor(3.0),
    }

    checkpoint = opened(tmp_path, parts, {"torch_dtype": str(dtype).removeprefix("torch.")})

    assert_values(checkpoint, values, dtype)


@pytest.mark.parametrize(
    ("shape", "scale_name", "config"),
    [
        ((), "weight_scale", {}),  # ModelOpt and compressed-tensors: per tensor
        ((1,), "scale_weight", {}),  # ComfyUI
        ((OUT, 1), "weight_scale", {}),
        ((OUT,), "weight_scale", {}),
        ((2, 3), "weight_scale_inv", {"quantization_config": {"weight_block_size": [40, 40]}}),
        ((4, 3), "weight_scale_inv", {}),
    ],
)
@pytest.mark.parametrize("numbers", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz])
def test_float8_is_number_times_the_scale_of_its_block(
    tmp_path: Path, shape: tuple[int, ...], scale_name: str, config: dict[str, object], numbers: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(OUT, IN, generator=generator).to(numbers)
    scale = torch.rand(shape, generator=generator) + 0.5
    if len(shape) == 2:
        rows, columns = (40, 40) if config else (OUT // shape[0], IN // shape[1])
        spread = scale.repeat_interleave(rows, 0)[:OUT].repeat_interleave(columns, 1)[:, :IN]
    else:
        spread = scale.reshape(-1, 1)

    checkpoint = opened(tmp_path, {"weight": weight, scale_name: scale}, {**config, "dtype": "bfloat16"})

    # Both factors have few enough digits that their product in float32 rounds to bfloat16 as the exact one does.
    (name,) = checkpoint.weights
    assert torch.equal(checkpoint.weights[name].read(), (weight.float() * spread).to(torch.bfloat16))
    assert torch.equal(checkpoint.weights[name].read_rows(3, 45), (weight.float() * spread).to(torch.bfloat16)[3:45])


def test_blocks_of_128_may_be_cut_off_at_the_edges(tmp_path: Path) -> None:
    weight = torch.randn(200, 300).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3) + 0.5
    spread = scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]

    checkpoint = opened(tmp_path, {"weight": weight, "weight_scale_inv": scale})

    assert_values(checkpoint, (weight.float() * spread).double(), torch.float32)


def test_float8_without_a_scale_is_worth_itself(tmp_path: Path) -> None:
    weight = torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2).reshape(16, 16)[:, :12]

    checkpoint = opened(tmp_path, {"weight": weight.contiguous()})

    assert_values(checkpoint, weight.double(), torch.bfloat16)


def test_compressed_integers_in_an_order_of_their_own_take_the_group_of_each_column(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(6)
    codes = torch.randint(-8, 8, (OUT, IN), generator=generator)
    scales = (torch.rand(OUT, 3, generator=generator) * 0.02).bfloat16()
    order = (torch.arange(IN) // GROUP)[torch.randperm(IN, generator=generator)]
    parts = {
        "weight_packed": in_words((codes + 8).T, 4).T,
        "weight_scale": scales,
        "weight_shape": torch.tensor([OUT, IN]),
        "weight_g_idx": order.to(torch.int32),
    }

    checkpoint = opened(tmp_path, parts)

    assert_values(checkpoint, codes.double() * scales.double()[:, order], torch.bfloat16)


def test_nf4_of_rows_that_end_inside_a_block_is_flat(tmp_path: Path) -> None:
    """Blocks run over the weight as one row, and a row of 25 values begins in the middle of a byte."""
    generator = torch.Generator().manual_seed(7)
    rows, columns, block = 14, 25, 64
    codes = torch.randint(0, 16, (rows * columns,), generator=generator)
    table = torch.linspace(-1, 1, 16)
    absmax = torch.rand(-(-rows * columns // block), generator=generator) + 0.1
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": [rows, columns]}
    parts = {
        "weight": ((codes[::2] << 4) | codes[1::2]).to(torch.uint8)[:, None],
        "weight.absmax": absmax,
        "weight.quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    flat = table[codes] * absmax.repeat_interleave(block)[: rows * columns]

    checkpoint = opened(tmp_path, parts)

    assert_values(checkpoint, flat.reshape(rows, columns).double(), torch.float32)
