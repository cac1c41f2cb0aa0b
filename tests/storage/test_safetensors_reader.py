"""What the strict reader accepts, the reference accepts; what it refuses, it refuses by name."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from loratools.errors import FormatError, InputError, MachineError, UsageError
from loratools.storage import system
from loratools.storage.safetensors_reader import MAX_HEADER, read_header
from loratools.tensors.dtypes import DTYPE_BITS, torch_dtype

TORCH_DTYPES = [name for name in DTYPE_BITS if not name.startswith(("F4", "F6"))]


def container(header: bytes | dict, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(begin: int, end: int, dtype: str = "U8", shape: list[object] | None = None) -> dict:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def write(folder: Path, data: bytes, name: str = "broken.safetensors") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def refusal(path: Path) -> FormatError:
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert type(caught.value) is FormatError
    assert caught.value.exit_code == 4
    assert f"'{path}'" in caught.value.message
    return caught.value


def reference_accepts(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            file.keys()
    except (SafetensorError, OSError):
        return False
    return True


def test_small_file_reads_as_its_bytes_say(tmp_path: Path) -> None:
    header = b'{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2],"data_offsets":[2,10]},' + (
        b'"a":{"dtype":"U8","shape":[2,1],"data_offsets":[0,2]}}  '
    )
    path = write(tmp_path, container(header, bytes([7, 9]) + struct.pack("<2f", 1.5, -2.0)))

    file = read_header(path)

    assert list(file.tensors) == ["a", "b"]  # in the order of the data, not of the header
    assert file.metadata == {"format": "pt"}
    assert file.data_offset == 8 + len(header)
    assert file.tensors["a"].read().tolist() == [[7], [9]]
    assert file.tensors["b"].read().tolist() == [1.5, -2.0]
    assert file.tensors["b"].location is not None
    assert file.tensors["b"].location.offset == file.data_offset + 2


@pytest.mark.parametrize("header", [{}, {"__metadata__": {}}, {"e": entry(0, 0, "F32", [0, 3])}])
def test_file_without_values_is_accepted(tmp_path: Path, header: dict) -> None:
    path = write(tmp_path, container(header))

    assert list(read_header(path).tensors) == [name for name in header if name != "__metadata__"]
    assert reference_accepts(path)


def test_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = container({"first": entry(0, 8, "F32", [2]), "second": entry(8, 20)}, bytes(range(20)))
    assert len(read_header(write(tmp_path, whole)).tensors) == 2

    for length in range(len(whole)):
        error = refusal(write(tmp_path, whole[:length]))
        if length >= len(whole) - 12:
            assert f"{len(whole) - length} bytes are missing" in error.message
            assert "'second'" in error.message


def test_large_file_cut_in_its_data_names_the_first_tensor_lost(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({f"t{i}": torch.zeros(100) for i in range(10)}, path)
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) - 401, len(whole) - 3999):
        error = refusal(write(tmp_path, whole[:length]))
        assert f"declares {len(whole):,} and has {length:,}" in error.message
    assert "'t0'" in error.message


@pytest.mark.parametrize("length", [0, 1, 1000, MAX_HEADER + 1, 1 << 63, (1 << 64) - 1])
def test_wrong_header_length_is_refused_without_allocating(tmp_path: Path, length: int) -> None:
    path = write(tmp_path, container({"a": entry(0, 4)}, b"\1\2\3\4", length=length))

    refusal(path)
    assert not reference_accepts(path)


BAD_HEADERS = {
    "hole": ({"a": entry(0, 2), "b": entry(3, 5)}, 5, ["bytes 2 to 3 before tensor 'b' (bytes 3 to 5)"]),
    "gap at start": ({"a": entry(1, 3)}, 3, ["bytes 0 to 1 before tensor 'a'"]),
    "overlap": (
        {"a": entry(0, 4), "b": entry(2, 6)}, 6,
        ["tensor 'b' (bytes 2 to 6) overlaps tensor 'a' (bytes 0 to 4)"],
    ),
    "same range": ({"a": entry(0, 4), "b": entry(0, 4)}, 4, ["tensor 'b'", "overlaps tensor 'a'"]),
    "begin after end": ({"a": {**entry(0, 2), "data_offsets": [2, 0]}}, 2, ["tensor 'a'", "begins at byte 2"]),
    "trailing": ({"a": entry(0, 2)}, 5, ["3 bytes after its last tensor"]),
    "shape": ({"a": entry(0, 4, "F32", [2])}, 4, ["tensor 'a'", "has 4 bytes", "F32 of shape [2] needs 8 bytes"]),
    "overflow 2^126": ({"a": entry(0, 4, "U8", [1 << 63, 1 << 63])}, 4, ["tensor 'a'", "shape"]),
    "overflow 2^64": ({"a": entry(0, 0, "U8", [1 << 32, 1 << 32])}, 0, ["tensor 'a'", "more elements"]),
    "overflow to zero": ({"a": entry(0, 0, "U8", [1 << 62, 4, 0])}, 0, ["tensor 'a'", "more elements"]),
    "negative axis": ({"a": entry(0, 4, "U8", [-4])}, 4, ["tensor 'a'", "[-4]"]),
    "float axis": ({"a": entry(0, 4, "U8", [4.0])}, 4, ["tensor 'a'", "[4.0]"]),
    "true axis": ({"a": entry(0, 1, "U8", [True])}, 1, ["tensor 'a'", "[True]"]),
    "text axis": ({"a": entry(0, 4, "U8", ["4"])}, 4, ["tensor 'a'"]),
    "70 axes": ({"a": entry(0, 1, "U8", [1] * 70)}, 1, ["tensor 'a'", "70 axes"]),
    "shape is no list": ({"a": {**entry(0, 4), "shape": 4}}, 4, ["tensor 'a'"]),
    "negative offset": ({"a": {**entry(0, 4), "data_offsets": [-4, 0]}}, 4, ["tensor 'a'", "[-4, 0]"]),
    "float offset": ({"a": {**entry(0, 4), "data_offsets": [0, 4.0]}}, 4, ["tensor 'a'", "[0, 4.0]"]),
    "three offsets": ({"a": {**entry(0, 4), "data_offsets": [0, 4, 4]}}, 4, ["tensor 'a'"]),
    "unknown dtype": ({"a": entry(0, 4, "F7")}, 4, ["tensor 'a'", "dtype 'F7'"]),
    "lower-case dtype": ({"a": entry(0, 4, "f32", [1])}, 4, ["tensor 'a'", "dtype 'f32'"]),
    "dtype is a list": ({"a": {**entry(0, 4), "dtype": ["F32"]}}, 4, ["tensor 'a'"]),
    "odd F4": ({"a": entry(0, 2, "F4", [3])}, 2, ["tensor 'a'", "3 values of 4 bits"]),
    "no dtype": ({"a": {"shape": [4], "data_offsets": [0, 4]}}, 4, ["tensor 'a'", "'dtype'"]),
    "extra field": ({"a": {**entry(0, 4), "x": 1}}, 4, ["tensor 'a'", "unknown field 'x'"]),
    "entry is a list": ({"a": [1]}, 0, ["tensor 'a'", "a list"]),
    "metadata of numbers": ({"__metadata__": {"k": 1}}, 0, ["'k' in '__metadata__'", "a number"]),
    "nested metadata": ({"__metadata__": {"k": {}}}, 0, ["'k' in '__metadata__'", "an object"]),
    "long name": ({"n" * 5000: entry(0, 4)}, 4, ["5,000 characters"]),
    "not an object": (b"[1,2,3]         ", 0, []),
    "space first": (b" {}", 0, []),
    "NUL padding": (b"{}\0\0\0\0\0\0", 0, []),
    "not UTF-8": (b'{"\xff":{}}', 0, ["not UTF-8"]),
    "lone surrogate": (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0, ["surrogate"]),
    "lone surrogate in metadata": (b'{"__metadata__":{"a":"\\udc00"}}', 0, ["surrogate"]),
    "NaN": (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}', 0, ["NaN"]),
    "1e999": (b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,0]}}', 0, ["too large"]),
    "minus zero": (b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', 0, ["tensor 'a'"]),
    "5000 digits": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}', 0, ["too large"]),
    "deep nesting": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0, ["nested too deeply"]),
    "two values": (b"{}{}", 0, ["not JSON"]),
    "duplicate": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        1, ["'a' twice"],
    ),
    "escaped duplicate": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"\\u0061":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1, ["'a' twice"],
    ),
    "duplicate metadata": (b'{"__metadata__":{},"__metadata__":{}}', 0, ["'__metadata__' twice"]),
    "duplicate in metadata": (b'{"__metadata__":{"k":"1","k":"2"}}', 0, ["'k' twice"]),
    "duplicate field": (b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0, ["'dtype' twice"]),
}  # fmt: skip

# Two parsers could see two models in these, or no writer makes them; the reference lets them pass.
REFERENCE_IS_LAXER = {
    "duplicate", "escaped duplicate", "extra field", "space first", "70 axes", "long name",
    "duplicate in metadata",
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_malformed_header_is_refused_by_name(tmp_path: Path, case: str) -> None:
    header, nbytes, words = BAD_HEADERS[case]
    path = write(tmp_path, container(header, b"\5" * nbytes))

    error = refusal(path)

    for word in words:
        assert word in error.message
    assert error.hint or "JSON" in error.message or "twice" in error.message or "header" in error.message
    assert reference_accepts(path) == (case in REFERENCE_IS_LAXER)


@pytest.mark.parametrize(
    ("data", "what", "hint"),
    [
        (b"", "an empty file", "download"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a git-LFS pointer", "git lfs pull"),
        (b"<!doctype html><html><head><title>404</title>", "a web page", "/resolve/"),
        (b'{"error":"Repository not found"}', "a JSON text", "download"),
        (b"Entry not found, nothing is here", "'Entry not found, nothing is here'", "download"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00a" + b"K\x01s." * 9, "a Python pickle", "convert"),
        (b"GGUF\x03\0\0\0" + b"\1" * 40, "a GGUF file", ".gguf"),
        (b"\x1f\x8b\x08" + b"\1" * 40, "a gzip archive", "unpack"),
        (bytes(64), "nothing but zeros", "download"),
    ],
)  # fmt: skip
def test_misnamed_file_is_refused_as_what_it_is(tmp_path: Path, data: bytes, what: str, hint: str) -> None:
    error = refusal(write(tmp_path, data))

    assert what in error.message
    assert error.hint is not None
    assert hint in error.hint


def test_torch_zip_and_numpy_archive_are_refused_as_what_they_are(tmp_path: Path) -> None:
    import numpy

    torch.save({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    numpy.savez(tmp_path / "b.npz", a=numpy.ones(2))

    assert "a PyTorch pickle" in refusal(tmp_path / "a.safetensors").message
    assert "a numpy archive" in refusal((tmp_path / "b.npz").rename(tmp_path / "b.safetensors")).message


def test_names_in_messages_are_on_one_line_and_harmless(tmp_path: Path) -> None:
    path = write(tmp_path, container({"a\x1b[31m\n\u202e": entry(0, 4, "F7")}, b"\1" * 4))

    assert "'a\\x1b[31m\\n\\u202e'" in refusal(path).message


@pytest.mark.parametrize("name", ["", ".", "../x", "[red]", "a" * 4096, "\x1b]0;x\x07", "ä\U0001f600"])
def test_odd_names_are_kept_as_they_are(tmp_path: Path, name: str) -> None:
    assert list(read_header(write(tmp_path, container({name: entry(0, 1)}, b"\1"))).tensors) == [name]


def test_missing_file_and_folder_and_fifo_are_refused_at_once(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "adapter_model.safetensors").touch()

    for name in ("missing", "dangling", "loop", "fifo/x", "nul\0"):
        with pytest.raises(UsageError):
            read_header(tmp_path / name)
    with pytest.raises(InputError, match="FIFO"):
        read_header(tmp_path / "fifo")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        read_header(tmp_path / "folder")
    with pytest.raises(InputError, match="device"):
        read_header(Path("/dev/zero"))


def test_unreadable_file_is_the_environments_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratools.storage import system

    path = write(tmp_path, container({}))

    def refuse(_: Path) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(system, "open_to_read", refuse)  # a mode of 000 does not stop root
    with pytest.raises(MachineError, match="no permission") as caught:
        read_header(path)
    assert caught.value.exit_code == 5


def test_link_into_a_cache_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(container({"a": entry(0, 1)}, b"\1"))
    (tmp_path / "model.safetensors").symlink_to("blob")

    file = read_header(tmp_path / "model.safetensors")

    assert file.file.path == tmp_path / "model.safetensors"  # the config lies beside the link, not beside the blob
    assert file.tensors["a"].read().tolist() == [1]


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_reference_file_of_every_dtype_reads_equal(tmp_path: Path, dtype: str) -> None:
    kind = torch_dtype(dtype)
    raw = torch.arange(24, dtype=torch.uint8).remainder(2 if dtype == "BOOL" else 25)
    values = raw.view(kind).reshape(-1, 1) if dtype != "BOOL" else raw.view(kind).reshape(4, 6)
    path = tmp_path / "x.safetensors"
    save_file({"v": values, "zero": values[:0], "one": values[0, 0].clone()}, path)

    tensors = read_header(path).tensors

    for name, wanted in load_file(path).items():
        found = tensors[name].read()
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert torch.equal(found.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8))
    assert torch.equal(tensors["v"].read_rows(1, 2).view(torch.uint8), values[1:2].view(torch.uint8))


@pytest.mark.parametrize(("dtype", "shape", "nbytes"), [("F4", [2, 3], 3), ("F6_E2M3", [4], 3), ("F6_E3M2", [8], 6)])
def test_packed_dtypes_are_listed_and_located(tmp_path: Path, dtype: str, shape: list[int], nbytes: int) -> None:
    path = write(tmp_path, container({"p": entry(0, nbytes, dtype, shape)}, b"\1" * nbytes))

    tensor = read_header(path).tensors["p"]

    assert (tensor.shape, tensor.dtype, tensor.nbytes) == (tuple(shape), dtype, nbytes)
    assert reference_accepts(path)


def test_many_tensors_take_linear_time(tmp_path: Path) -> None:
    def seconds(count: int) -> float:
        header = {f"tensor.{i}.weight": entry(4 * i, 4 * i + 4, "F32", [1]) for i in range(count)}
        path = write(tmp_path, container(header, bytes(4 * count)))
        start = time.perf_counter()
        assert len(read_header(path).tensors) == count
        return time.perf_counter() - start

    seconds(1000)
    # Quadratic would be a factor of 400; a slow machine or a pause may cost some of the difference.
    assert seconds(40_000) < 100 * max(seconds(2_000), 0.003)


def test_zero_size_tensors_at_one_place_are_accepted(tmp_path: Path) -> None:
    header = {"z1": entry(0, 0, "F32", [0]), "a": entry(0, 4), "z2": entry(4, 4, "F32", [3, 0]), "z3": entry(4, 4)}
    path = write(tmp_path, container(header, b"\1" * 4))

    assert set(read_header(path).tensors) == set(header)
    assert reference_accepts(path)


# Mutations of a valid file, to find what one parser takes and the other does not.
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "F9"]),
        "shape": st.lists(st.integers(-1, 5), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2),
    }
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.dictionaries(st.text(max_size=3), _ENTRY, max_size=3),
    repair=st.booleans(),
    junk=st.binary(max_size=2),
    flip=st.none() | st.tuples(st.integers(0, 400), st.integers(0, 255)),
)
def test_what_is_accepted_the_reference_accepts(
    tmp_path: Path, entries: dict, repair: bool, junk: bytes, flip: tuple[int, int] | None
) -> None:
    end = 0
    if repair:  # else hardly any example would be valid
        for value in entries.values():
            value["shape"] = [abs(n) for n in value["shape"]]
            value["dtype"] = "U8" if value["dtype"] == "F9" else value["dtype"]
            bits = DTYPE_BITS[value["dtype"]]
            for n in value["shape"]:
                bits *= n
            value["data_offsets"] = [end, end + bits // 8]
            end += bits // 8
        junk = b""
    data = bytearray(container(entries, b"\2" * end + junk))
    if flip and flip[0] < len(data):
        data[flip[0]] = flip[1]
    path = write(tmp_path, bytes(data))

    try:
        found = read_header(path)
    except FormatError:
        return
    assert reference_accepts(path)
    with safe_open(path, "pt") as reference:
        assert set(reference.keys()) == set(found.tensors)
        assert (reference.metadata() or {}) == found.metadata


def test_metadata_that_is_null_is_none_as_mlx_writes_it(tmp_path: Path) -> None:
    header = b'{"__metadata__":null,"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abc")

    found = read_header(tmp_path / "x.safetensors")

    assert (found.metadata, list(found.tensors)) == ({}, ["a"])


def test_a_file_is_looked_at_once_for_its_identity_and_its_time_of_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, container({"a": entry(0, 1, shape=[1])}, b"\x07"), "one.safetensors")
    read_header(path)
    looked_at: list[Path] = []
    original = system.stat

    def counting(asked: Path) -> os.stat_result:
        looked_at.append(asked)
        return original(asked)

    monkeypatch.setattr(system, "stat", counting)
    read_header(path)

    assert looked_at == [path]


def test_a_header_is_read_anew_where_size_and_time_of_writing_were_set_back(tmp_path: Path) -> None:
    path = write(tmp_path, container({"a": entry(0, 1, shape=[1])}, b"\x07"), "one.safetensors")
    before = path.stat()
    assert list(read_header(path).tensors) == ["a"]

    with path.open("r+b") as file:
        file.write(container({"b": entry(0, 1, shape=[1])}, b"\x07"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert list(read_header(path).tensors) == ["b"]
