"""Views of lazy tensors: any rows of them are those of the whole, and what lies in one piece keeps its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools.storage.files import read_bytes
from loratools.storage.safetensors_reader import read_header
from loratools.tensors.joined import block_diagonal, block_matrix
from loratools.tensors.lazy import from_torch
from loratools.tensors.views import reordered, reshaped, rows, transposed


def test_rows_and_shapes_of_a_stored_tensor_keep_their_place_in_the_file(tmp_path: Path) -> None:
    values = torch.randn(3, 4, 5)
    save_file({"a": values}, tmp_path / "a.safetensors")
    stored = read_header(tmp_path / "a.safetensors").tensors["a"]

    second = reshaped(rows(stored, 1, 2), (4, 5))

    assert torch.equal(second.read(), values[1])
    assert torch.equal(second.read_rows(1, 3), values[1, 1:3])
    assert second.location is not None
    assert read_bytes(second.location) == values[1].numpy().tobytes()
    assert rows(stored, 0, 3) is stored
    with pytest.raises(IndexError):
        rows(stored, 2, 4)


def test_rows_in_another_order_are_read_in_it() -> None:
    values = torch.randn(5, 3)

    view = reordered(from_torch(values), (4, 0, 0, 2))

    assert view.shape == (4, 3)
    assert torch.equal(view.read(), values[[4, 0, 0, 2]])
    assert torch.equal(view.read_rows(1, 3), values[[0, 0]])
    assert torch.equal(transposed(view).read(), values[[4, 0, 0, 2]].T)


def test_blocks_stand_in_zeros() -> None:
    first, second = torch.randn(2, 3), torch.randn(3, 1)
    wanted = torch.zeros(7, 5)
    wanted[1:3, :3], wanted[4:7, 4:] = first, second

    view = block_matrix((7, 5), [(1, 0, from_torch(first)), (4, 4, from_torch(second))])

    assert torch.equal(view.read(), wanted)
    for start in range(7):
        assert torch.equal(view.read_rows(start, 7), wanted[start:])
        assert torch.equal(view.read_rows(0, start), wanted[:start])
    with pytest.raises(ValueError, match="is not inside"):
        block_matrix((7, 5), [(6, 0, from_torch(first))])


def test_blocks_of_several_dtypes_or_with_factors_are_in_a_dtype_that_holds_them() -> None:
    first, second = torch.randn(2, 3), torch.randn(3, 1).half()

    mixed = block_matrix((7, 5), [(0, 0, from_torch(first)), (4, 4, from_torch(second))])
    halved = block_diagonal([from_torch(second), 2, from_torch(second)], [0.5, 1.0])

    assert mixed.dtype == halved.dtype == "F32"
    assert torch.equal(mixed.read()[4:, 4:], second.float())
    wanted = torch.zeros(8, 2)
    wanted[:3, :1], wanted[5:, 1:] = second.float() / 2, second.float()
    assert torch.equal(halved.read(), wanted)
