# ruff: noqa: PT012 (what happens inside an interrupted block is the subject)
"""What is written: byte for byte as laid out, readable by the reference, complete or absent."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from loratools.errors import FormatError, InputError, MachineError
from loratools.storage import system
from loratools.storage.safetensors_reader import read_header
from loratools.storage.safetensors_writer import SafetensorsWriter, TensorSpec, layout, write_safetensors
from loratools.tensors.dtypes import DTYPE_BITS, torch_dtype
from loratools.tensors.lazy import from_torch
from loratools.tensors.views import transposed

DTYPES = [name for name in DTYPE_BITS if not name.startswith(("F4", "F6"))]


def test_small_file_has_these_bytes(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"

    write_safetensors(path, {"b": torch.tensor([1.0, -2.0]), "a": torch.tensor(7, dtype=torch.uint8)}, {"format": "pt"})

    header = (
        b'{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"U8","shape":[],"data_offsets":[8,9]}}'
    )
    padding = b" " * (-len(header) % 8)
    data = bytes.fromhex("0000803f 000000c0 07")
    assert path.read_bytes() == len(header + padding).to_bytes(8, "little") + header + padding + data


def test_second_write_is_byte_identical_and_keeps_order_and_metadata(tmp_path: Path) -> None:
    tensors = {name: torch.arange(i + 1, dtype=torch.int16) for i, name in enumerate(["z", "a", "m"])}
    metadata = {"y": "1", "b": "ü\n", "x": ""}
    write_safetensors(tmp_path / "one", tensors, metadata)

    first = read_header(tmp_path / "one")
    write_safetensors(tmp_path / "two", first.tensors, first.metadata)

    assert list(first.tensors) == ["z", "a", "m"]
    assert list(first.metadata.items()) == list(metadata.items())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_output_mode_follows_the_umask_and_a_replaced_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_safetensors(tmp_path / "x", {"a": torch.ones(1)}, {})
        assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
        (tmp_path / "x").chmod(0o604)
        write_safetensors(tmp_path / "x", {"a": torch.ones(2)}, {})
        assert (tmp_path / "x").stat().st_mode & 0o777 == 0o604
    finally:
        os.umask(before)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=4).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
        max_size=4,
    ),
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), st.text(max_size=4), max_size=2),
)
def test_what_is_written_the_reference_reads_equal(tmp_path: Path, specs: dict, metadata: dict[str, str]) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        name: torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(1)).to(torch_dtype(dtype))
        for name, (dtype, shape) in specs.items()
    }
    try:
        "".join(metadata.values()).encode()
    except UnicodeEncodeError:
        with pytest.raises(InputError, match="surrogate"):
            write_safetensors(path, tensors, metadata)
        return

    write_safetensors(path, tensors, metadata)

    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    with safe_open(path, "pt") as reference:
        assert (reference.metadata() or {}) == metadata


def test_views_and_lazy_tensors_are_written_by_value(tmp_path: Path) -> None:
    matrix = torch.arange(60.0).reshape(6, 10)
    write_safetensors(tmp_path / "base", {"m": matrix}, {})
    stored = read_header(tmp_path / "base").tensors["m"]

    write_safetensors(
        tmp_path / "x",
        {
            "copied": stored,
            "turned": transposed(stored),
            "held": from_torch(matrix.T),
            "strided": matrix[1:5:2, ::3],
            "conj": torch.tensor([1 + 2j]).conj(),
            "parameter": torch.nn.Parameter(matrix[:1]),
        },
        {},
    )

    found = load_file(tmp_path / "x")
    assert torch.equal(found["copied"], matrix)
    assert torch.equal(found["turned"], matrix.T)
    assert torch.equal(found["held"], matrix.T)
    assert torch.equal(found["strided"], matrix[1:5:2, ::3])
    assert found["conj"].tolist() == [1 - 2j]
    assert torch.equal(found["parameter"], matrix[:1])


def test_large_lazy_tensor_is_written_in_row_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratools.storage import safetensors_writer

    matrix = torch.arange(77.0).reshape(7, 11)
    monkeypatch.setattr(safetensors_writer, "_BLOCK", 100)  # two rows of 44 bytes

    write_safetensors(tmp_path / "x", {"m": from_torch(matrix)}, {})

    assert torch.equal(load_file(tmp_path / "x")["m"], matrix)


def test_file_may_be_rewritten_from_its_own_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_safetensors(path, {"a": torch.arange(1000.0), "b": torch.ones(3)}, {})

    write_safetensors(path, {"a": read_header(path).tensors["a"]}, {})

    assert torch.equal(load_file(path)["a"], torch.arange(1000.0))
    assert list(load_file(path)) == ["a"]


def test_rows_may_come_in_any_order_and_by_any_route(tmp_path: Path) -> None:
    matrix = torch.arange(60, dtype=torch.int32).reshape(6, 10)
    write_safetensors(tmp_path / "base", {"m": matrix}, {})
    location = read_header(tmp_path / "base").tensors["m"].location
    assert location is not None

    with SafetensorsWriter(
        tmp_path / "x", [TensorSpec("rows", "I32", (6, 10)), TensorSpec("copy", "I32", (6, 10))], {}
    ) as writer:
        writer.write_rows("rows", 4, matrix[4:])
        writer.copy("copy", location)
        writer.write_rows("rows", 0, matrix[:1])
        os.pwrite(writer.fd, matrix[1:4].numpy().tobytes(), writer.offset("rows") + 40)
        writer.account("rows", 40, 120)

    assert torch.equal(load_file(tmp_path / "x")["rows"], matrix)
    assert torch.equal(load_file(tmp_path / "x")["copy"], matrix)


def test_file_with_a_missing_row_is_not_finished(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "x", [TensorSpec("done", "U8", (2,)), TensorSpec("m", "U8", (3, 2))], {})
    writer.write("done", torch.zeros(2, dtype=torch.uint8))
    writer.write_rows("m", 0, torch.zeros(1, 2, dtype=torch.uint8))
    writer.write_rows("m", 0, torch.zeros(1, 2, dtype=torch.uint8))  # twice the same row is not two rows
    writer.write_rows("m", 2, torch.zeros(1, 2, dtype=torch.uint8))

    with pytest.raises(RuntimeError, match="m was written to byte 2 of 6"):
        writer.finish()
    writer.abandon()
    assert not (tmp_path / "x").exists()


def test_tensor_that_was_announced_otherwise_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="announced"),
        SafetensorsWriter(tmp_path / "x", [TensorSpec("m", "F32", (3, 2))], {}) as writer,
    ):
        with pytest.raises(ValueError, match="announced"):
            writer.write("m", torch.zeros(2, 3))
        with pytest.raises(ValueError, match="do not fit"):
            writer.write_rows("m", 2, torch.zeros(2, 2))
        writer.write("m", torch.zeros(3, 2, dtype=torch.bfloat16))
    assert not (tmp_path / "x").exists()


def test_file_without_room_is_removed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(system, "allocate", full)
    with pytest.raises(MachineError, match="no space left") as caught:
        SafetensorsWriter(tmp_path / "x", [TensorSpec("a", "U8", (1000,))], {})

    assert caught.value.details == ("1,072 bytes are needed",)
    assert list(tmp_path.iterdir()) == []


def test_existing_file_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")

    with pytest.raises(OSError, match="exists"):
        SafetensorsWriter(tmp_path / "x", [], {})
    assert (tmp_path / "x").read_text() == "mine"


def test_names_that_cannot_be_stored_are_refused() -> None:
    for names in (["a", "a"], ["__metadata__"], ["\ud800"]):
        with pytest.raises(InputError):
            layout([TensorSpec(name, "U8", (1,)) for name in names], {})


def test_header_beyond_the_formats_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from loratools.storage import safetensors_writer

    monkeypatch.setattr(safetensors_writer, "MAX_HEADER", 100)
    with pytest.raises(InputError, match="shards"):
        layout([TensorSpec(f"tensor{i}", "U8", (1,)) for i in range(3)], {})


def test_layout_is_aligned_and_gives_absolute_offsets() -> None:
    found = layout([TensorSpec("a", "F32", (3,)), TensorSpec("b", "BF16", (0, 4)), TensorSpec("c", "F4", (4,))], {})

    assert len(found.header) % 8 == 0
    start = len(found.header)
    assert found.offsets == {"a": start, "b": start + 12, "c": start + 12}
    assert found.size == start + 14


def test_written_file_cut_by_one_byte_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {"a": torch.ones(3)}, {})
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])

    with pytest.raises(FormatError, match="1 bytes are missing"):
        read_header(tmp_path / "x")


def test_header_is_what_json_writes_without_spaces() -> None:
    names = ["a.weight", 'quo"te', "back\\slash", "tab\t", "déjà.vu", "字", "\x7f", "same.kind"]
    specs = [TensorSpec(name, "BF16" if i % 2 else "F32", (i, 3) if i else ()) for i, name in enumerate(names)]
    specs[-1] = TensorSpec("same.kind", "BF16", (1, 3))
    metadata = {"format": "pt", "note": 'x "y" é'}
    entries: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for spec in specs:
        entries[spec.name] = {"dtype": spec.dtype, "shape": [*spec.shape], "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes

    header = layout(specs, metadata).header

    assert header[8:].rstrip(b" ") == json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
