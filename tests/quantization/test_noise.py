"""The error of quantisation as it is estimated from the packed weight alone, against the error that was made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import peers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratools.checkpoints import open_checkpoint
from loratools.quantization.common.noise import quantisation_error
from loratools.tensors.joined import stacked
from loratools.tensors.lazy import LazyTensor, from_torch
from loratools.tensors.views import rows, transposed

ROWS, COLUMNS = 192, 256


def weights() -> Tensor:
    return 0.02 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))


def float8(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    return {"l.weight": (weight / scale).to(torch.float8_e4m3fn), "l.weight_scale": scale}


def nf4(weight: Tensor) -> dict[str, Tensor]:
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return {"l.weight": packed, **{f"l.weight.{k}": v for k, v in state.as_dict(packed=True).items()}}


def int8(weight: Tensor) -> dict[str, Tensor]:
    import bitsandbytes.functional as bnb

    packed, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    return {"l.weight": packed, "l.SCB": scales, "l.weight_format": torch.tensor(0, dtype=torch.uint8)}


def read(path: Path, tensors: dict[str, Tensor]) -> LazyTensor:
    save_file(tensors, path)
    return open_checkpoint(path).weights["l.weight"]


@pytest.mark.parametrize(
    "quantise",
    [
        pytest.param(float8, id="fp8"),
        pytest.param(nf4, id="nf4", marks=peers.needs("bitsandbytes")),
        pytest.param(int8, id="int8", marks=peers.needs("bitsandbytes")),
    ],
)
def test_the_estimated_error_is_the_one_that_was_made(
    tmp_path: Path, quantise: Callable[[Tensor], dict[str, Tensor]]
) -> None:
    weight = weights()
    packed = read(tmp_path / "model.safetensors", quantise(weight))

    made = float((packed.read().double() - weight.double()).square().mean().sqrt())

    assert quantisation_error(packed) == pytest.approx(made, rel=0.08)


@peers.needs("gguf")
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_so_is_that_of_blocks_of_gguf(tmp_path: Path, kind: str) -> None:
    import gguf

    weight = weights()
    name, writer = "blk.0.ffn_up.weight", gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    type_ = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    packed = open_checkpoint(tmp_path / "model.gguf").weights[name]

    made = float(np.sqrt(np.square(packed.read().double().numpy() - weight.double().numpy()).mean()))

    assert quantisation_error(packed) == pytest.approx(made, rel=0.12)


def test_plain_values_have_none() -> None:
    assert quantisation_error(from_torch(weights())) == 0.0


def test_a_view_has_the_error_of_what_it_shows(tmp_path: Path) -> None:
    packed = read(tmp_path / "model.safetensors", float8(weights()))
    plain = from_torch(torch.zeros(3 * ROWS, COLUMNS, dtype=torch.float32))

    alone = quantisation_error(packed)

    assert quantisation_error(transposed(packed)) == alone
    assert quantisation_error(rows(packed, 5, 12)) == alone
    # A quarter of the values has the error: the mean square is a quarter.
    assert quantisation_error(stacked([packed, plain])) == pytest.approx(alone / 2)
