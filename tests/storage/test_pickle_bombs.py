"""A small pickle costs little time and memory, whatever it asks for, and ends as bad input."""

from __future__ import annotations

import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from loratools.errors import FormatError, InputError
from loratools.storage.files import identify
from loratools.storage.stored_zip import StoredZip
from loratools.storage.torch_pickle import read_pickle

TEXT = b"X" + struct.pack("<I", 10**5) + b"a" * 10**5
REBUILD = b"ctorch._tensor\n_rebuild_from_type_v2\nq\x01"
STORAGE = (
    b"ctorch._utils\n_rebuild_tensor_v2\nq\x01((X\x07\0\0\0storageq\x02ctorch\nFloatStorage\nq\x03X\x01\0\0\x000X\x03\0\0\0cpu"
    b"Kdtq\x04Qq\x05"
)
BODIES = {
    "a reference that holds itself twice, forty times over": b"(K\x01q\0" + b"0h\0h\0\x86q\0" * 40 + b"K\0K\0K\0K\0tQ",
    "calls inside of calls": REBUILD + b"0h\x01h\x01NN\x87" + b"q\x020h\x01Nh\x02\x87" * 3000 + b"R",
    "copies of a list": b"]q\0(" + b"N" * 20_000 + b"e0ctorch\nSize\nq\x010(" + b"h\x01h\0\x85R" * 40_000 + b"t",
    "copies of a text": TEXT + b"q\0"
    + b"0c_codecs\nencode\nq\x01X\x06\0\0\0latin1q\x020(" + b"h\x01h\0h\x02\x86R" * 10**4
    + b"t",
    "copies of pairs": b"](" + b"K\0K\0\x86" * 5000 + b"eq\x000ccollections\nOrderedDict\nq\x010("
    + b"h\x01h\0\x85R" * 20_000
    + b"t",
    "a key of nested tuples": b"(K\x01" + b"\x85" * 10_000 + b"q\0Nd",
    "a shape of many axes, many times": STORAGE + b"(" + b"K\x01" * 20_000 + b"tq\x060(" + b"h\x01(h\x05K\0h\x06h\x06tR"
    * 20_000 + b"t",
}  # fmt: skip


@pytest.mark.parametrize("what", BODIES)
def test_small_pickle_takes_little_time_and_memory(tmp_path: Path, what: str) -> None:
    path = tmp_path / "adapter_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + BODIES[what] + b".")
        archive.writestr("archive/data/0", b"\0" * 400)
    tracemalloc.start()
    began = time.process_time()

    with pytest.raises(InputError) as caught:
        read_pickle(path)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.exit_code == 4
    assert time.process_time() - began < 10
    assert peak < 60 * path.stat().st_size + (32 << 20)


def test_archive_without_entries_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.bin", "w"):
        pass

    with pytest.raises(FormatError, match="without entries"):
        StoredZip(identify(tmp_path / "x.bin"))
