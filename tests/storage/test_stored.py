"""Values of stored tensors, with and without torch."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import pytest
import torch

from loratools.errors import UnsupportedError
from loratools.storage.files import identify
from loratools.storage.stored import StridedTensor, stored
from loratools.tensors.dtypes import DTYPE_BITS, torch_dtype
from loratools.tensors.files import ByteRange


def write(folder: Path, data: bytes) -> Path:
    (folder / "x").write_bytes(data)
    return folder / "x"


def test_rows_are_owned_and_writable(tmp_path: Path) -> None:
    file = identify(write(tmp_path, b"?" + bytes(range(12))))
    tensor = stored(file, 1, (3, 4), "U8")

    rows = tensor.read_rows(1, 3)
    rows += 100

    assert rows.tolist() == [[104, 105, 106, 107], [108, 109, 110, 111]]
    assert tensor.read_rows(1, 2).tolist() == [[4, 5, 6, 7]]
    assert tensor.read_rows(2, 2).shape == (0, 4)
    assert pickle.loads(pickle.dumps(tensor)) == tensor  # travels to other processes
    with pytest.raises(IndexError):
        tensor.read_rows(2, 4)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "BOOL", "I8"])
def test_scalars_of_one_byte_agree_with_torch(tmp_path: Path, dtype: str) -> None:
    values = bytes(range(2 if dtype == "BOOL" else 256))
    file = identify(write(tmp_path, values))
    wanted = torch.frombuffer(bytearray(values), dtype=torch.uint8).view(torch_dtype(dtype)).to(torch.float32).tolist()

    found = [stored(file, i, (), dtype).scalar() for i in range(len(values))]

    for a, b in zip(found, wanted, strict=True):
        assert a == b or (math.isnan(a) and math.isnan(b))
        assert math.copysign(1, a) == math.copysign(1, b) or math.isnan(a)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64", "I16", "U16", "I32", "U32", "I64", "U64"])
def test_scalars_agree_with_torch(tmp_path: Path, dtype: str) -> None:
    value = torch.tensor(3.25).to(torch_dtype(dtype)) if "F" in dtype else torch.tensor(77).to(torch_dtype(dtype))
    file = identify(write(tmp_path, value.reshape(1).view(torch.uint8).numpy().tobytes()))

    for shape in ((), (1,), (1, 1)):
        assert stored(file, 0, shape, dtype).scalar() == float(value)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_packed_values_are_refused_by_name(tmp_path: Path, dtype: str) -> None:
    tensor = stored(identify(write(tmp_path, b"\1\2\3")), 0, (3 * 8 // DTYPE_BITS[dtype],), dtype)

    assert tensor.nbytes == 3
    assert tensor.location == ByteRange(tensor.location.file, 0, 3)  # type: ignore[union-attr]
    with pytest.raises(UnsupportedError, match=dtype):
        tensor.read()


def test_dtype_that_this_torch_lacks_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = stored(identify(write(tmp_path, b"\1")), 0, (1,), "F8_E8M0")
    monkeypatch.delattr(torch, "float8_e8m0fnu")

    with pytest.raises(UnsupportedError, match="F8_E8M0"):
        tensor.read()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
def test_tensors_without_values_read_as_such(tmp_path: Path, shape: tuple[int, ...]) -> None:
    assert stored(identify(write(tmp_path, b"")), 0, shape, "BF16").read().shape == shape


def test_strided_rows_equal_the_view(tmp_path: Path) -> None:
    base = torch.arange(60.0).reshape(6, 10)
    file = identify(write(tmp_path, base.numpy().tobytes()))
    for view in (base.T, base[1:5, 2:9:3], base[2].expand(4, 10), base.reshape(3, 2, 10).permute(2, 0, 1)):
        offset = view.storage_offset() * 4
        span = ByteRange(file, offset, 240 - offset)
        source = StridedTensor(span, tuple(view.shape), view.stride(), "F32")

        assert torch.equal(source.read_rows(0, view.shape[0]), view)
        assert torch.equal(source.read_rows(1, 3), view[1:3])
        assert source.read_rows(1, 1).shape == (0, *view.shape[1:])
        assert source.read_rows(0, 2).is_contiguous()
