"""OFT of trainers of image models, written out in float64: OneTrainer's (`modules/module/oft_utils.py` of
Nerogar/OneTrainer) and that of sd-scripts (`networks/oft.py`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratools import formats
from loratools.errors import FormatError, UnsupportedError
from loratools.tensors.lazy import from_torch
from loratools.updates.lycoris_oft import LycorisOFT
from loratools.updates.oft import OFT

LINEAR = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_1_resnets_0_conv1"
SIZE = 4


def _stored(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "oft.safetensors")
    return tmp_path / "oft.safetensors"


def _skew(blocks: int) -> Tensor:
    return 0.2 * torch.randn(blocks, SIZE * (SIZE - 1) // 2, generator=torch.Generator().manual_seed(blocks))


def _rotation(skew: Tensor, repeats: int = 1) -> Tensor:
    """Block-diagonal R: I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4."""
    upper = torch.zeros(len(skew), SIZE, SIZE, dtype=torch.float64)
    rows, columns = torch.triu_indices(SIZE, SIZE, 1)
    upper[:, rows, columns] = skew.double()
    q = upper - upper.mT
    r = torch.eye(SIZE, dtype=torch.float64) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
    return torch.block_diag(*(list(r) * repeats))


def _delta(update: object, base: Tensor) -> Tensor:
    assert isinstance(update, OFT | LycorisOFT)
    rows = update.prepare(from_torch(base), weight=1.0, dtype="F64").rows(
        0, base.shape[0], base.numpy().reshape(len(base), -1)
    )
    return torch.from_numpy(np.asarray(rows)).reshape(base.shape)


def _update(path: Path) -> object:
    (update,) = formats.load(path).updates.values()
    return update


@pytest.mark.parametrize("scaled", [False, True])
def test_inputs_of_a_linear_layer_are_rotated(tmp_path: Path, scaled: bool) -> None:
    skew = _skew(3)
    tensors = {f"{LINEAR}.oft_R.weight": skew} | ({f"{LINEAR}.oft_R.scaled_oft": torch.tensor(1)} if scaled else {})
    base = torch.randn(7, 3 * SIZE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    x = torch.randn(5, 3 * SIZE, generator=torch.Generator().manual_seed(8), dtype=torch.float64)

    delta = _delta(_update(_stored(tmp_path, tensors)), base)

    r = _rotation(skew / (6**0.5 if scaled else 1))
    torch.testing.assert_close(x @ (base + delta).T, (x @ r) @ base.T)


def test_one_block_serves_for_all(tmp_path: Path) -> None:
    skew = _skew(1)
    base = torch.randn(7, 5 * SIZE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    delta = _delta(_update(_stored(tmp_path, {f"{LINEAR}.oft_R.weight": skew})), base)

    torch.testing.assert_close(base + delta, base @ _rotation(skew, 5).T)


def test_the_weight_of_a_convolution_is_rotated(tmp_path: Path) -> None:
    skew = _skew(9)
    base = torch.randn(6, SIZE, 3, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    delta = _delta(_update(_stored(tmp_path, {f"{CONV}.oft_R.weight": skew})), base)

    torch.testing.assert_close((base + delta).reshape(6, -1), base.reshape(6, -1) @ _rotation(skew))


def test_what_else_is_beside_it_is_refused_by_name(tmp_path: Path) -> None:
    odd = _stored(tmp_path, {f"{LINEAR}.oft_R.weight": torch.ones(3, 7)})
    with pytest.raises(FormatError) as fault:
        formats.load(odd)
    assert "above the diagonal of no block" in fault.value.details[0]
    more = _stored(tmp_path, {f"{LINEAR}.oft_R.weight": _skew(3), f"{LINEAR}.dora_scale": torch.ones(7, 1)})
    with pytest.raises(UnsupportedError) as refused:
        formats.load(more)
    assert "OFT of OneTrainer with" in refused.value.details[0]


@pytest.mark.parametrize("alpha", [1e-3, 10.0])
def test_outputs_are_rotated_by_sd_scripts_within_its_constraint(tmp_path: Path, alpha: float) -> None:
    blocks = 0.1 * torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(3))
    name = LINEAR.replace("lora_unet_", "oft_unet_")
    path = _stored(tmp_path, {f"{name}.oft_blocks": blocks, f"{name}.alpha": torch.tensor(alpha)})
    base = torch.randn(10, 7, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    delta = _delta(_update(path), base)

    assert formats.detect(path) == ["kohya"]
    q = blocks.double() - blocks.double().mT
    q *= min(1.0, float(torch.tensor(alpha)) * 10 / float(q.norm()))
    eye = torch.eye(5, dtype=torch.float64)
    r = (eye + q) @ torch.linalg.inv(eye - q)
    wanted = torch.einsum("knm,knp->kmp", r, base.reshape(2, 5, 7)).reshape(10, 7)
    torch.testing.assert_close(base + delta, wanted, rtol=1e-6, atol=1e-7)
