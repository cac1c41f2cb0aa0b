"""GGUF headers: what the gguf package writes we read, what we write it reads, and what is damaged is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import peers
import pytest
import torch

from loratools.errors import FormatError, InputError, UnsupportedError
from loratools.storage.gguf_reader import read_gguf
from loratools.storage.gguf_writer import write_gguf
from loratools.tensors.lazy import from_torch

gguf = peers.load("gguf")


def written(path: Path, *, tensors: dict[str, np.ndarray], raw: dict[str, object] | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("some.count", 7)
    writer.add_float32("some.number", 0.25)
    writer.add_bool("some.flag", True)
    writer.add_array("some.texts", ["a", "bc"])
    writer.add_array("some.numbers", [3, 4, 5])
    writer.add_float64("some.double", 0.1)
    writer.add_int64("some.negative", -9)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=(raw or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@peers.needs("gguf")
def test_what_the_gguf_package_writes_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": rng.standard_normal((3, 5)).astype(np.float32),
        "b.weight": rng.standard_normal((2, 3, 4)).astype(np.float16),
        "c": rng.standard_normal(7),
    }

    found = read_gguf(written(tmp_path / "x.gguf", tensors=tensors))

    assert found.fields["general.architecture"] == "llama"
    assert {k: v for k, v in found.fields.items() if k.startswith("some.")} == {
        "some.count": 7, "some.number": 0.25, "some.flag": True, "some.texts": ["a", "bc"], "some.numbers": [3, 4, 5],
        "some.double": 0.1, "some.negative": -9,
    }  # fmt: skip
    assert {n: (t.shape, t.dtype) for n, t in found.tensors.items()} == {
        "a.weight": ((3, 5), "F32"), "b.weight": ((2, 3, 4), "F16"), "c": ((7,), "F64"),
    }  # fmt: skip
    for name, values in tensors.items():
        assert np.array_equal(found.tensors[name].read().numpy(), values)
    assert np.array_equal(found.tensors["a.weight"].read_rows(1, 3).numpy(), tensors["a.weight"][1:3])


@peers.needs("gguf")
def test_q8_0_is_decoded_as_the_gguf_package_does_and_other_types_are_named(tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    packed = {
        kind: gguf.quants.quantize(values, kind)
        for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0)
    }
    names = {kind.name: kind for kind in packed}
    path = written(tmp_path / "x.gguf", tensors={k.name: v for k, v in packed.items()}, raw=dict(names))

    found = read_gguf(path)

    assert (found.decoded, dict(found.quantised)) == (("Q8_0",), {"Q4_0": "Q4_0"})
    wanted = gguf.quants.dequantize(packed[names["Q8_0"]], names["Q8_0"])
    assert np.array_equal(found.tensors["Q8_0"].read().numpy(), wanted)
    assert np.array_equal(found.tensors["Q8_0"].read_rows(2, 4).numpy(), wanted[2:4])


@peers.needs("gguf")
def test_what_is_written_the_gguf_package_reads(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(3, 5), "y": torch.randn(2, 3, 4).half(), "z": torch.randn(7, 2).bfloat16()}

    write_gguf(
        tmp_path / "x.gguf",
        {"general.architecture": "llama", "general.type": "adapter", "count": 3, "adapter.lora.alpha": 1.5},
        {name: from_torch(t) for name, t in tensors.items()},
    )

    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert reader.get_field("general.type").contents() == "adapter"
    assert (reader.get_field("count").contents(), reader.get_field("adapter.lora.alpha").contents()) == (3, 1.5)
    found = {t.name: t for t in reader.tensors}
    assert {n: tuple(int(s) for s in t.shape) for n, t in found.items()} == {"x": (5, 3), "y": (4, 3, 2), "z": (2, 7)}
    assert np.array_equal(found["x"].data, tensors["x"].numpy())
    assert np.array_equal(found["y"].data, tensors["y"].numpy())
    assert found["z"].tensor_type.name == "BF16"
    assert found["z"].data.tobytes() == tensors["z"].view(torch.int16).numpy().tobytes()
    assert read_gguf(tmp_path / "x.gguf").tensors.keys() == tensors.keys()


@peers.needs("gguf")
def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = written(tmp_path / "x.gguf", tensors={"a": np.ones((3, 8), np.float32)}).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(1, len(whole), 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(InputError):
            read_gguf(cut)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _file(
    path: Path, *, keys: bytes = b"", count: int = 0, infos: bytes = b"", tensors: int = 0, version: int = 3
) -> Path:
    header = b"GGUF" + struct.pack("<IQQ", version, tensors, count) + keys + infos
    path.write_bytes(header + bytes(-len(header) % 32) + bytes(256))
    return path


def _info(name: str, offset: int, kind: int = 0, shape: tuple[int, ...] = (4,)) -> bytes:
    return _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"version": 1}, "version 1"),
        ({"version": 0x03000000}, "big-endian"),
        ({"keys": (_text("a") + struct.pack("<IB", 7, 1)) * 2, "count": 2}, "'a' twice"),
        ({"keys": _text("a") + struct.pack("<I", 99), "count": 1}, "unknown type 99"),
        ({"keys": struct.pack("<Q", 1 << 40), "count": 1}, "declares a text of"),
        ({"count": 1 << 60}, "declares a count of"),
        ({"keys": _text("general.alignment") + struct.pack("<II", 4, 3), "count": 1}, "alignment of 3"),
        ({"infos": _info("t", 0) * 2, "tensors": 2}, "'t' of"),
        ({"infos": _info("t", 0, shape=(16,)) + _info("u", 32), "tensors": 2}, "overlaps 't'"),
        ({"infos": _info("t", 8), "tensors": 1}, "begins at byte"),
        ({"infos": _info("t", 1 << 20), "tensors": 1}, "cut off"),
        ({"infos": _info("t", 0, shape=(2,) * 5), "tensors": 1}, "5 axes"),
        ({"infos": _info("t", 0, kind=8, shape=(33, 2)), "tensors": 1}, "no whole number of blocks"),
    ],
)
def test_a_malformed_file_is_refused_by_name(options: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises((FormatError, UnsupportedError)) as raised:
        read_gguf(_file(tmp_path / "x.gguf", **options))  # type: ignore[arg-type]

    assert said in raised.value.message


def test_another_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"<!doctype html><html></html>")

    with pytest.raises(FormatError, match="is not a GGUF file but a web page"):
        read_gguf(tmp_path / "x.gguf")
