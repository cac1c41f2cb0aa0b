"""What torch.save writes is read without torch and without unpickling; everything else is refused by name."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from loratools.errors import FormatError, InputError, UnsupportedError, UsageError
from loratools.storage.torch_pickle import read_pickle
from loratools.tensors.dtypes import DTYPE_BITS, torch_dtype

DTYPES = [name for name in DTYPE_BITS if not name.startswith(("F4", "F6"))]
SHARED = Path(__file__).parents[2].parent / "shared"

both_containers = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(value: object, path: Path, *, zipped: bool = True, protocol: int = 2) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return path


def assert_equal(path: Path, wanted: dict[str, torch.Tensor]) -> None:
    found = read_pickle(path).tensors
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        values = found[name].read()
        assert (values.dtype, values.shape) == (tensor.dtype, tensor.shape), name
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(values.reshape(-1).view(torch.uint8), raw), name


@both_containers
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_reads_equal(tmp_path: Path, zipped: bool, protocol: int) -> None:
    raw = torch.arange(48, dtype=torch.uint8)
    tensors = {name: (raw % (2 if name == "BOOL" else 49)).view(torch_dtype(name)).clone() for name in DTYPES}

    path = save(tensors, tmp_path / "x.bin", zipped=zipped, protocol=protocol)

    assert_equal(path, tensors)
    assert all(tensor.location is not None for tensor in read_pickle(path).tensors.values())


@both_containers
def test_views_parameters_and_shared_storages_read_equal(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(60.0).reshape(6, 10)
    annotated = torch.nn.Parameter(torch.ones(2))
    annotated.note = "attributes change how a parameter is pickled"  # type: ignore[attr-defined]
    tensors = {
        "base": base,
        "transposed": base.T,
        "rows": base[2:4],
        "columns": base[:, 3:5],
        "steps": base[::2, 1::3],
        "expanded": torch.arange(3.0).expand(4, 3),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "scalar of a matrix": base[5, 9],
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base[0]),
        "annotated": annotated,
        "one row": base[3:4].T,
        "float8 view": torch.arange(6.0).to(torch.float8_e4m3fn).reshape(2, 3).T,
        "uint16": torch.tensor([1, 65535], dtype=torch.uint16)[1:],
    }

    path = save(collections.OrderedDict(tensors), tmp_path / "x.pt", zipped=zipped)

    assert_equal(path, tensors)
    found = read_pickle(path).tensors
    assert found["rows"].location is not None
    assert found["transposed"].location is None
    assert torch.equal(found["columns"].read_rows(1, 3), base[1:3, 3:5])
    assert found["scalar of a matrix"].scalar() == 59
    assert pickle.loads(pickle.dumps(found["transposed"])) == found["transposed"]


@both_containers
def test_state_dict_of_a_module_reads_equal(tmp_path: Path, zipped: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))

    assert_equal(save(module.state_dict(), tmp_path / "x.bin", zipped=zipped), dict(module.state_dict()))


@both_containers
@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
def test_one_wrapper_is_taken_off_and_named(tmp_path: Path, zipped: bool, wrapper: str) -> None:
    value = {
        "epoch": 3,
        wrapper: {"a": torch.ones(2), "version": "1"},
        "optimizer": {"state": {0: torch.zeros(2)}},
        "lr": 0.5,
        "done": True,
        "parent": None,
        "device": torch.device("cpu"),
    }

    file = read_pickle(save(value, tmp_path / "x.ckpt", zipped=zipped))

    assert file.inside == wrapper
    assert list(file.tensors) == ["a"]
    assert file.other == {"version": "1", "epoch": 3, "lr": 0.5, "done": True, "parent": None, "device": "cpu"}
    assert file.ignored == ("optimizer",)


def test_tensors_beside_a_wrapper_win_and_two_wrappers_are_refused(tmp_path: Path) -> None:
    flat = read_pickle(save({"a": torch.ones(1), "model": {"b": torch.ones(1)}}, tmp_path / "flat"))
    assert (flat.inside, list(flat.tensors), flat.ignored) == ("", ["a"], ("model",))

    with pytest.raises(FormatError, match="under 'state_dict' and 'model'"):
        read_pickle(save({"model": {"a": torch.ones(1)}, "state_dict": {"b": torch.ones(1)}}, tmp_path / "two"))
    with pytest.raises(FormatError, match="holds one tensor"):
        read_pickle(save(torch.ones(1), tmp_path / "bare"))
    with pytest.raises(FormatError, match="holds a list"):
        read_pickle(save([torch.ones(1)], tmp_path / "list"))
    with pytest.raises(FormatError, match="key 7"):
        read_pickle(save({7: torch.ones(1)}, tmp_path / "number"))


def test_real_loralib_checkpoint_reads_equal() -> None:
    path = SHARED / "real" / "adapters" / "microsoft-lora" / "roberta_base_lora_mnli.bin"
    if not path.exists():
        pytest.skip("../shared with real adapters is not here")

    wanted = torch.load(path, map_location="cpu", weights_only=True)

    assert len(wanted) == 52
    assert_equal(path, wanted)


class Malicious:
    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple[object, ...]:
        return self.call[0], self.call[1:]


@both_containers
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_pickle_is_named_and_not_run(tmp_path: Path, zipped: bool, protocol: int) -> None:
    sentinel = tmp_path / "sentinel"
    for call, name in [
        ((os.system, f"touch {sentinel}"), "posix.system"),
        ((eval, f"open({str(sentinel)!r}, 'w')"), "builtins.eval"),
        ((getattr, os, "system"), "builtins.getattr"),
        ((torch.hub.load, "x", "y"), "torch.hub.load"),
        ((torch.load, "x"), "torch.serialization.load"),
    ]:
        value = {"a": torch.ones(2), "evil": Malicious(*call) if call[0] is not getattr else Malicious(getattr, 1, "x")}
        path = save(value, tmp_path / "adapter_model.bin", zipped=zipped, protocol=protocol)
        with pytest.raises(UnsupportedError) as caught:
            read_pickle(path)
        assert f"'{name}'" in caught.value.message
        assert caught.value.exit_code == 4
        assert caught.value.hint is not None
        assert "safetensors" in caught.value.hint
    assert not sentinel.exists()

    torch.load(save(Malicious(os.system, f"touch {sentinel}"), tmp_path / "x"), weights_only=False)
    assert sentinel.exists()  # the attack works on what it is meant for


@both_containers
@pytest.mark.parametrize("value", [argparse.Namespace(lr=1), torch.nn.Linear(2, 2), torch.ones(2, 2).to_sparse(), 1j])
def test_harmless_but_unknown_objects_are_refused_by_name(tmp_path: Path, zipped: bool, value: object) -> None:
    with pytest.raises(UnsupportedError, match="refers to"):
        read_pickle(save({"a": torch.ones(2), "b": value}, tmp_path / "x.pt", zipped=zipped))


def test_plain_and_foreign_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UnsupportedError, match=r"torch\.save did not write"):
        read_pickle(tmp_path / "x.pkl")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Malicious(os.system, "false")))
    with pytest.raises(UnsupportedError, match=r"posix\.system"):
        read_pickle(tmp_path / "evil.pkl")
    for data, words in [(b"", "an empty file"), (b"<html>", "a web page"), (b"\1" * 99, "by its first bytes")]:
        (tmp_path / "x.bin").write_bytes(data)
        with pytest.raises(FormatError, match=words):
            read_pickle(tmp_path / "x.bin")
    with pytest.raises(UsageError):
        read_pickle(tmp_path / "missing.bin")


def legacy(tmp_path: Path, program: bytes) -> Path:
    """A legacy file up to the object, which is `program`."""
    head = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    (tmp_path / "x.pt").write_bytes(head + program)
    return tmp_path / "x.pt"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (b"\x80\x02\x82\x01.", "opcode 0x82"),  # a registered extension
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "opcode 0x81"),  # NEWOBJ
        (b"\x80\x02(iposix\nsystem\n.", "opcode 0x69"),
        (b"\x80\x02\x93.", "no sense"),  # empty stack
        (b"\x80\x02h\x07.", "no sense"),  # unknown memo
        (b"\x80\x09.", "no sense"),
        (b"\x80\x02X\xff\xff\xff\x7f", "cut off"),
        (b"\x80\x02\x8e" + b"\xff" * 8, "cut off"),
        (b"\x80\x02\x8b\x00\x01\x00\x00" + b"\1" * 256 + b".", "no sense"),  # a huge integer
        (b"\x80\x02}]K\x01s.", "no sense"),  # a list as a key
        (b"\x80\x02}(K\x01\x85\x85K\x01u.", "no sense"),  # a tuple as a key
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "no sense"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "no sense"),  # a type is not called
        (b"\x80\x02ccollections\nOrderedDict\n}K\x01K\x02sb.", "no sense"),  # state on what is no dictionary
        (b"\x80\x02U\x01aQ.", "only storages"),
        (b"\x80\x02" + b"0" * 10, "no sense"),
        (b"\x80\x02cx", "no sense"),
    ],
)
def test_malformed_programs_are_refused(tmp_path: Path, program: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_pickle(legacy(tmp_path, program))


def test_bombs_of_a_few_bytes_take_neither_time_nor_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratools.storage import pickle_machine

    start = time.perf_counter()
    # 2^60 elements when written out, 60 tuples in memory; as a key it would take forever to hash.
    doubled = b"\x80\x02}" + b")" + b"2\x86" * 60 + b"K\x01s."
    with pytest.raises(FormatError):
        read_pickle(legacy(tmp_path, doubled))
    in_a_set = b"\x80\x02cbuiltins\nset\n](" + b")" + b"2\x86" * 60 + b"e\x85R."
    with pytest.raises(FormatError):
        read_pickle(legacy(tmp_path, in_a_set))
    assert time.perf_counter() - start < 2

    monkeypatch.setattr(pickle_machine, "_MAX_STEPS", 1000)
    with pytest.raises(FormatError, match="steps"):
        read_pickle(legacy(tmp_path, b"\x80\x02" + b"]" * 2000 + b"."))
    monkeypatch.setattr(pickle_machine, "_MAX_BYTES", 1 << 17)
    with pytest.raises(FormatError, match="bytes besides"):
        read_pickle(legacy(tmp_path, b"\x80\x02" + (b"X\0\0\1\0" + b"a" * 65536) * 3 + b"."))


def test_tensor_that_repeats_a_few_bytes_to_terabytes_is_refused(tmp_path: Path) -> None:
    path = save({"a": torch.ones(1).expand(1 << 20, 1 << 20)}, tmp_path / "x.pt")

    with pytest.raises(UnsupportedError, match="'a'"):
        read_pickle(path)


@both_containers
def test_tensor_beyond_its_storage_is_refused(tmp_path: Path, zipped: bool) -> None:
    path = save({"a": torch.zeros(77)}, tmp_path / "x.pt", zipped=zipped)
    data = path.read_bytes()
    assert data.count(b"KM\x85") == 1  # BININT1 77 TUPLE1: the shape
    for wrong in (b"KN\x85", b"K\xff\x85"):
        path.write_bytes(data.replace(b"KM\x85", wrong))
        with pytest.raises(FormatError, match="'a'"):
            read_pickle(path)


@both_containers
def test_file_cut_anywhere_is_refused(tmp_path: Path, zipped: bool) -> None:
    whole = save({"a": torch.ones(2, 3), "b": torch.zeros(5)}, tmp_path / "x.pt", zipped=zipped).read_bytes()
    for length in range(0, len(whole), 1 if len(whole) < 1200 else 3):
        (tmp_path / "x.pt").write_bytes(whole[:length])
        with pytest.raises(InputError):
            read_pickle(tmp_path / "x.pt")


@both_containers
def test_flipped_bytes_end_in_an_error_or_in_bounded_reads(tmp_path: Path, zipped: bool) -> None:
    whole = save({"a": torch.ones(2, 3).T, "b": torch.zeros(5)}, tmp_path / "x.pt", zipped=zipped).read_bytes()
    rng, refused = random.Random(3), 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "x.pt").write_bytes(data)
        try:
            for tensor in read_pickle(tmp_path / "x.pt").tensors.values():
                tensor.read()
        except InputError:
            refused += 1
    assert refused > 25


def rezip(
    path: Path, change: dict[str, bytes | None], *, compression: int = zipfile.ZIP_STORED, extra: str = ""
) -> Path:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(entries)).split("/")[0]
    entries.update({f"{root}/{name}": data for name, data in change.items()})  # type: ignore[dict-item]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries.items():
            if data is not None:
                archive.writestr(name, data)
        if extra:
            archive.writestr(extra, b"x")
    path.write_bytes(buffer.getvalue())
    return path


def test_archive_repacked_without_alignment_reads_equal(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(7.0), "b": torch.arange(5, dtype=torch.int8)}

    assert_equal(rezip(save(tensors, tmp_path / "x.pt"), {}), tensors)
    assert_equal(rezip(save(tensors, tmp_path / "x.pt"), {"byteorder": None}), tensors)  # torch before 2.1


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_unsound_archives_are_refused(tmp_path: Path) -> None:
    def fresh() -> Path:
        return save({"a": torch.ones(1000)}, tmp_path / "x.pt")

    cases: list[tuple[Path, str]] = []

    def refused(path: Path, words: str) -> None:
        cases.append((path, words))
        with pytest.raises(InputError, match=words):
            read_pickle(path)

    refused(rezip(fresh(), {}, compression=zipfile.ZIP_DEFLATED), "compressed")
    refused(rezip(fresh(), {}, extra="x/../../etc/passwd"), "outside")
    refused(rezip(fresh(), {}, extra="/etc/passwd"), "outside")
    refused(rezip(fresh(), {}, extra="x/data/0"), "twice")
    refused(rezip(fresh(), {"data/0": None}), "lacks the storage '0'")
    refused(rezip(fresh(), {"data/0": b"short"}), "'a'")
    refused(rezip(fresh(), {"data.pkl": None}), r"data\.pkl")
    refused(rezip(fresh(), {"byteorder": b"big"}), "byte order")
    refused(rezip(fresh(), {"constants.pkl": b""}), "TorchScript")
    data = fresh().read_bytes()
    (tmp_path / "x.pt").write_bytes(data + b"tail")
    refused(tmp_path / "x.pt", "after its end|without its end")
    local = data.index(b"x/data/0")
    (tmp_path / "x.pt").write_bytes(data[:local] + b"x/data/1" + data[local + 8 :])
    refused(tmp_path / "x.pt", "not where it should be")
    # The directory says that the storage is larger than the file, in the 64-bit fields as well as the old ones.
    central = data.rindex(b"x/data/0") - 46
    huge = bytearray(data)
    struct.pack_into("<2I", huge, central + 20, 0x7FFFFFFF, 0x7FFFFFFF)
    (tmp_path / "x.pt").write_bytes(huge)
    refused(tmp_path / "x.pt", "the next begins")


def test_zip64_directory_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.arange(7.0)}
    path = save(tensors, tmp_path / "x.pt")
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)  # so that the module writes what a file of 5 GB has

    rezip(path, {})

    assert b"PK\x06\x06" in path.read_bytes()
    assert_equal(path, tensors)


def test_big_endian_legacy_and_conjugated_views_are_refused(tmp_path: Path) -> None:
    head = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": False}))
    (tmp_path / "x.pt").write_bytes(head)
    with pytest.raises(UnsupportedError, match="byte order"):
        read_pickle(tmp_path / "x.pt")
    with pytest.raises(UnsupportedError, match="conjugated"):
        read_pickle(save({"a": torch.ones(2, dtype=torch.complex64).conj()}, tmp_path / "y.pt"))


def test_many_tensors_are_listed_quickly(tmp_path: Path) -> None:
    path = save({f"layer.{i}.weight": torch.zeros(1) for i in range(2000)}, tmp_path / "x.pt")

    start = time.perf_counter()
    assert len(read_pickle(path).tensors) == 2000
    assert time.perf_counter() - start < 3


def test_reading_does_not_import_what_is_named(tmp_path: Path) -> None:
    (tmp_path / "trap.py").write_text("print('imported')")
    legacy(tmp_path, b"\x80\x02ctrap\nx\n.")
    script = """
import sys
from pathlib import Path
from loratools.errors import UnsupportedError
from loratools.storage.torch_pickle import read_pickle
try:
    read_pickle(Path(sys.argv[1]))
except UnsupportedError:
    print("refused", "trap" in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{tmp_path}"}

    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "x.pt")], env=environment, capture_output=True, text=True
    )

    assert (done.stdout, done.stderr) == ("refused False\n", "")
