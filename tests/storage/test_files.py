"""Reading and writing bytes: every route gives the same bytes, and a changed input is noticed."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from loratools.errors import ChangedInputError, MachineError, UsageError
from loratools.storage import files, system
from loratools.tensors.files import ByteRange

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def location(tmp_path: Path) -> ByteRange:
    (tmp_path / "in").write_bytes(CONTENT)
    return ByteRange(files.identify(tmp_path / "in"), 100, 9000)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Without:
    """The os module less some of its functions, as on another system."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def __getattr__(self, name: str) -> object:
        if name in self._names:
            raise AttributeError(name)
        return getattr(os, name)


ROUTES = [(), ("preadv",), ("preadv", "pread", "pwrite", "copy_file_range", "posix_fadvise", "posix_fallocate")]


@pytest.mark.parametrize("missing", ROUTES)
def test_every_route_reads_and_writes_the_same(
    location: ByteRange, tmp_path: Path, missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "os", Without(*missing))
    monkeypatch.setattr(files, "_KERNEL_BLOCK", 1000)
    monkeypatch.setattr(files, "_WORTH_WRITEBACK", 1)

    buffer = bytearray(50)
    files.read_into(location, 7, buffer)
    fd = system.create(tmp_path / "out")
    system.allocate(fd, 9010)
    files.copy_range(location, fd, 10)
    files.write_at(fd, b"0123456789", 0)
    files.start_writeback(fd, 0, 9010)
    files.advise_sequential(location)
    system.close(fd)

    assert files.read_bytes(location) == CONTENT[100:9100]
    assert files.read_bytes(location, 5, 9) == CONTENT[105:109]
    assert bytes(buffer) == CONTENT[107:157]
    assert (tmp_path / "out").read_bytes() == b"0123456789" + CONTENT[100:9100]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_copy_goes_on_without_the_kernel_after_part_of_it(
    location: ByteRange, tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.copy_file_range, []

    def once(source: int, target: int, count: int, *offsets: int) -> int:
        calls.append(count)
        if len(calls) > 1:
            raise OSError(code, "refused")
        return real(source, target, 123, *offsets)

    monkeypatch.setattr(os, "copy_file_range", once)
    monkeypatch.setattr(files, "_COPY_BLOCK", 1000)
    fd = system.create(tmp_path / "out")
    files.copy_range(location, fd, 0)
    system.close(fd)

    assert calls == [9000, 8877]
    assert (tmp_path / "out").read_bytes() == CONTENT[100:9100]


def test_short_transfers_are_completed(location: ByteRange, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_MOST_AT_ONCE", 7)

    fd = system.create(tmp_path / "out")
    files.write_at(fd, files.read_bytes(location), 0)
    system.close(fd)

    assert (tmp_path / "out").read_bytes() == CONTENT[100:9100]


def test_reading_outside_of_a_range_is_a_bug(location: ByteRange) -> None:
    with pytest.raises(ValueError, match="outside"):
        files.read_bytes(location, 8999, 9001)


@pytest.mark.parametrize("how", ["longer", "shorter", "rewritten", "replaced", "gone"])
def test_input_changed_before_it_is_opened_is_noticed(location: ByteRange, how: str) -> None:
    path = location.file.path
    if how == "longer":
        path.write_bytes(CONTENT + b"x")
    elif how == "shorter":
        path.write_bytes(CONTENT[:-1])
    elif how == "rewritten":
        path.write_bytes(CONTENT)
        os.utime(path, ns=(0, location.file.mtime_ns + 1))
    else:
        path.rename(path.with_name("kept"))  # so that its inode is not given out again
        if how == "replaced":
            path.write_bytes(CONTENT)
            os.utime(path, ns=(0, location.file.mtime_ns))

    with pytest.raises(ChangedInputError) as caught:
        files.read_bytes(location)
    assert caught.value.exit_code == 5
    assert f"'{path}'" in caught.value.message


def test_input_that_shrinks_while_open_raises_instead_of_killing(location: ByteRange, tmp_path: Path) -> None:
    files.read_bytes(location, 0, 1)
    os.truncate(location.file.path, 500)

    with pytest.raises(ChangedInputError, match="shorter"):
        files.read_bytes(location)
    fd = system.create(tmp_path / "out")
    with pytest.raises(ChangedInputError, match="shorter"):
        files.copy_range(location, fd, 0)
    system.close(fd)


def test_replaced_input_keeps_its_old_bytes_while_open(location: ByteRange) -> None:
    files.read_bytes(location, 0, 1)
    location.file.path.unlink()
    location.file.path.write_bytes(b"\0" * len(CONTENT))

    assert files.read_bytes(location) == CONTENT[100:9100]


def test_descriptors_are_few_and_survive_eviction_while_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.close_inputs()
    monkeypatch.setattr(files, "_MOST_OPEN", 3)
    ranges = []
    for i in range(12):
        (tmp_path / f"f{i}").write_bytes(bytes([i]) * 5000)
        ranges.append(ByteRange(files.identify(tmp_path / f"f{i}"), 0, 5000))
    before = open_descriptors()
    wrong: list[int] = []

    def work(seed: int) -> None:
        for k in range(200):
            i = (k * 7 + seed) % 12
            if files.read_bytes(ranges[i], k, k + 100) != bytes([i]) * 100:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not wrong
    assert open_descriptors() <= before + 3
    files.close_inputs()
    assert open_descriptors() <= before


def test_input_closed_while_in_use_is_closed_after_use(location: ByteRange) -> None:
    with files._inputs.borrow(location.file) as fd:
        files.close_inputs()
        assert os.fstat(fd).st_size == len(CONTENT)
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(fd)


def test_many_inputs_are_read_under_a_low_limit_of_descriptors(tmp_path: Path) -> None:
    script = f"""
import resource
from pathlib import Path
from loratools.storage import files
from loratools.tensors.files import ByteRange
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
paths = [Path({str(tmp_path)!r}) / str(i) for i in range(60)]
for path in paths:
    path.write_bytes(b'x')
for path in paths:
    assert files.read_bytes(ByteRange(files.identify(path), 0, 1)) == b'x'
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_reads_though_a_thread_of_the_parent_held_the_lock(location: ByteRange) -> None:
    with files._inputs._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if files.read_bytes(location, 0, 4) == CONTENT[100:104] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_full_disk_is_explained(location: ByteRange, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):

        def refuse(*_: object, code: int = code) -> int:
            raise OSError(code, "no")

        monkeypatch.setattr(system, "write_from", refuse)
        with pytest.raises(MachineError) as caught:
            files.write_at(0, b"x", 0, path=tmp_path / "out")
        assert f"could not write '{tmp_path / 'out'}'" in caught.value.message
        assert caught.value.hint is not None
        # A limit on the size of a file has nothing to do with what the disk has left.
        assert ("bytes are free there" in caught.value.hint) == (code != errno.EFBIG)


def test_sha256_and_free_space_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_COPY_BLOCK", 1000)
    (tmp_path / "x").write_bytes(CONTENT)
    (tmp_path / "empty").touch()

    assert files.sha256(tmp_path / "x") == hashlib.sha256(CONTENT).hexdigest()
    assert files.sha256(tmp_path / "empty") == hashlib.sha256().hexdigest()
    assert files.free_space(tmp_path / "not" / "there" / "yet") > 0
    with pytest.raises(UsageError, match="no file"):
        files.sha256(tmp_path / "missing")


def test_reading_a_header_imports_neither_torch_nor_numpy(tmp_path: Path) -> None:
    import torch

    from loratools.storage.safetensors_writer import write_safetensors

    write_safetensors(tmp_path / "x.safetensors", {"alpha": torch.tensor(3.5, dtype=torch.bfloat16)}, {})
    torch.save({"alpha": torch.tensor(2.5)}, tmp_path / "x.bin")
    script = """
import sys
from pathlib import Path
from loratools.storage import (
    commit, files, json_file, safetensors_reader, safetensors_writer, sniff, stored, system, torch_pickle)
folder = Path(sys.argv[1])
assert safetensors_reader.read_header(folder / 'x.safetensors').tensors['alpha'].scalar() == 3.5
assert torch_pickle.read_pickle(folder / 'x.bin').tensors['alpha'].scalar() == 2.5
heavy = {'torch', 'numpy', 'safetensors', 'ctypes', 'zipfile', 'pickle'} & set(sys.modules)
print(*heavy)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("\n", "")


def test_only_system_calls_the_system() -> None:
    """Else a test that makes the n-th call fail would miss some."""
    import ast

    harmless = {"fspath", "fsencode", "fsdecode", "stat_result", "path", "register_at_fork"}
    folder = Path(files.__file__).parent
    for path in folder.glob("*.py"):
        if path.name == "system.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                assert node.attr in harmless, f"{path.name}:{node.lineno} os.{node.attr}"
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                assert called not in {"open", "write_bytes", "read_text", "write_text", "unlink"}, path.name
