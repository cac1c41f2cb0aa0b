"""Archives of numpy arrays, without numpy and without pickles."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import peers
import pytest
import torch

from loratools.errors import FormatError, InputError, UnsupportedError
from loratools.storage.npz_reader import read_npz


def test_what_numpy_saves_is_read_in_either_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "rows": rng.standard_normal((3, 5)),
        "columns": np.asfortranarray(rng.standard_normal((3, 5, 2)).astype(np.float32)),
        "half": rng.standard_normal(4).astype(np.float16),
        "number": np.array(2.5),
        "whole": np.arange(6, dtype=np.int64).reshape(2, 3),
        "empty": np.zeros((0, 3), np.float32),
    }
    np.savez(tmp_path / "x.npz", **arrays)

    found = read_npz(tmp_path / "x.npz")

    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
        "rows": ((3, 5), "F64"), "columns": ((3, 5, 2), "F32"), "half": ((4,), "F16"), "number": ((), "F64"),
        "whole": ((2, 3), "I64"), "empty": ((0, 3), "F32"),
    }  # fmt: skip
    for name, values in arrays.items():
        assert np.array_equal(found[name].read().numpy(), values)
    assert np.array_equal(found["columns"].read_rows(1, 3).numpy(), arrays["columns"][1:3])
    assert found["number"].scalar() == 2.5
    assert (found["rows"].location is None, found["columns"].location is None) == (False, True)


@peers.needs("mlx")
def test_what_mlx_saves_is_read_bfloat16_too(tmp_path: Path) -> None:
    import mlx.core as mx

    mx.savez(str(tmp_path / "x.npz"), a=mx.arange(12, dtype=mx.bfloat16).reshape(3, 4), b=mx.ones((2, 3)).T)

    found = read_npz(tmp_path / "x.npz")

    assert torch.equal(found["a"].read(), torch.arange(12).reshape(3, 4).bfloat16())
    assert torch.equal(found["b"].read(), torch.ones(3, 2))


def test_objects_and_compression_are_refused_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", a=np.array([{"x": 1}], dtype=object))
    with pytest.raises(UnsupportedError, match=r"'a' .* is a pickle of objects"):
        read_npz(tmp_path / "objects.npz")
    np.savez(tmp_path / "texts.npz", a=np.array(["x"]))
    with pytest.raises(UnsupportedError, match="no numbers that are read"):
        read_npz(tmp_path / "texts.npz")
    np.savez_compressed(tmp_path / "packed.npz", a=np.zeros(1000))
    with pytest.raises(UnsupportedError, match="is compressed"):
        read_npz(tmp_path / "packed.npz")


def _archive(path: Path, content: bytes, name: str = "a.npy") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)
    return path


def _array(header: bytes, data: bytes, version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"something else", "does not begin as an array does"),
        (_array(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", bytes(7)), "has 7 bytes"),
        (_array(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", bytes(9)), "has 9 bytes"),
        (_array(b"{'descr': '<f4', 'shape': (2,)}", bytes(8)), "without descr, fortran_order and shape"),
        (_array(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-2,)}", b""), "has the shape (-2,)"),
        (_array(b"{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}", bytes(4)), "has the shape (True,)"),
        (_array(b"__import__('os')", b""), "cannot be read"),
        (_array(b"(" * 9000, b""), "cannot be read"),
        (_array(b"x", b"", version=b"\x09\x00"), "does not begin"),
    ],
)
def test_a_malformed_array_is_refused_by_name(content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        read_npz(_archive(tmp_path / "x.npz", content))

    assert said in raised.value.message


def test_an_archive_of_other_things_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"holds 'a\.txt', which is no array"):
        read_npz(_archive(tmp_path / "x.npz", b"x", name="a.txt"))
