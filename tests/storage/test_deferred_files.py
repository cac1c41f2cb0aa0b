"""Files whose bytes lie elsewhere: what is fetched by ranges, what is downloaded, and that zeros are never values."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

import loratools
from loratools.storage.deferred_files import FRONT_BYTES, DeferredFile, defer, download_all, fetch_fronts
from loratools.storage.files import copy_file, identify, read_bytes, read_whole, reading, sha256
from loratools.tensors.files import ByteRange

PACKAGE = Path(loratools.__file__).parent


class Elsewhere:
    """A file with content somewhere else, and what was asked of it."""

    def __init__(self, folder: Path, content: bytes) -> None:
        self.content = content
        self.ranges: list[tuple[int, int]] = []
        self.downloads = 0
        self.path = folder / "here.safetensors"
        self._there = folder / "there.safetensors"
        with self.path.open("xb") as file:
            file.truncate(len(content))
        defer(DeferredFile(self.path, len(content), self._fetch, self._download))

    def _fetch(self, start: int, stop: int) -> bytes:
        self.ranges.append((start, stop))
        return self.content[start:stop]

    def _download(self) -> Path:
        self.downloads += 1
        self._there.write_bytes(self.content)
        return self._there

    def bytes(self, start: int, stop: int) -> bytes:
        return read_bytes(ByteRange(identify(self.path), 0, len(self.content)), start, stop)


def safetensors(header_bytes: int, values: int) -> bytes:
    """A file with a header of this length, and values of random bytes."""
    return header_bytes.to_bytes(8, "little") + b"{" + b" " * (header_bytes - 1) + os.urandom(values)


def test_a_short_header_is_one_request(tmp_path: Path) -> None:
    file = Elsewhere(tmp_path, safetensors(1000, 5_000_000))

    assert file.bytes(0, 1024) == file.content[:1024]
    assert file.bytes(8, 1008) == file.content[8:1008]

    assert file.ranges == [(0, FRONT_BYTES)]


def test_a_long_header_is_two_requests_and_no_value(tmp_path: Path) -> None:
    file = Elsewhere(tmp_path, safetensors(300_000, 5_000_000))

    assert file.bytes(0, 1024) == file.content[:1024]
    assert file.bytes(8, 300_008) == file.content[8:300_008]

    assert file.ranges == [(0, FRONT_BYTES), (FRONT_BYTES, 300_008)]
    assert file.downloads == 0


def test_values_are_read_from_the_file_that_is_downloaded_once(tmp_path: Path) -> None:
    file = Elsewhere(tmp_path, safetensors(1000, 5_000_000))

    assert file.bytes(2000, 1_002_000) == file.content[2000:1_002_000]
    assert file.bytes(0, 5_001_008) == file.content
    with reading(ByteRange(identify(file.path), 100, 50)) as read:
        buffer = bytearray(20)
        read(5, memoryview(buffer))

    assert bytes(buffer) == file.content[105:125]
    assert (file.ranges, file.downloads) == ([], 1)


def test_every_way_of_reading_gives_the_content(tmp_path: Path) -> None:
    import hashlib

    file = Elsewhere(tmp_path, safetensors(1000, 300_000))

    copy_file(ByteRange(identify(file.path), 0, len(file.content)), tmp_path / "copy")

    assert (tmp_path / "copy").read_bytes() == file.content
    assert read_whole(file.path) == file.content
    assert sha256(file.path) == hashlib.sha256(file.content).hexdigest()


def test_a_few_numbers_far_apart_are_ranges_and_many_are_a_download(tmp_path: Path) -> None:
    file = Elsewhere(tmp_path, safetensors(1000, 20_000_000))

    places = range(1_000_000, 20_000_000, 500_000)
    for place in places:
        assert file.bytes(place, place + 4) == file.content[place : place + 4]

    assert len(file.ranges) == 16
    assert file.downloads == 1


def test_a_file_that_is_read_whole_and_is_not_small_is_downloaded(tmp_path: Path) -> None:
    file = Elsewhere(tmp_path, os.urandom(FRONT_BYTES + 1))

    assert read_whole(file.path) == file.content

    assert (file.ranges, file.downloads) == ([], 1)


def test_the_first_bytes_of_several_files_are_fetched_and_all_of_them_downloaded(tmp_path: Path) -> None:
    files = []
    for name in "abc":
        (tmp_path / name).mkdir()
        files.append(Elsewhere(tmp_path / name, safetensors(1000, 200_000)))
    paths = [file.path for file in files]

    fetch_fronts(paths)
    assert [file.ranges for file in files] == [[(0, FRONT_BYTES)]] * 3
    download_all([*paths, *paths])

    assert [file.downloads for file in files] == [1, 1, 1]


def test_a_failed_download_is_no_content(tmp_path: Path) -> None:
    path = tmp_path / "here"
    path.write_bytes(bytes(300_000))

    def fail(*ignored: object) -> Path:
        raise loratools.MachineError("no network")

    defer(DeferredFile(path, 300_000, fail, fail))  # type: ignore[arg-type]

    for start, stop in ((0, 10), (200_000, 200_004), (0, 300_000)):
        with pytest.raises(loratools.MachineError, match="no network"):
            read_bytes(ByteRange(identify(path), 0, 300_000), start, stop)


# A person's own file, and one of the package.
_OPEN_THEMSELVES = {"ops/combine/recipe.py", "updates/parts/wavelets.py"}


def test_nothing_above_storage_opens_files_by_itself() -> None:
    # Whoever did would read the empty content of a file whose bytes lie elsewhere.
    faults = []
    for layer in ("updates", "quantization", "checkpoints", "naming", "formats", "checks", "ops"):
        for path in sorted((PACKAGE / layer).rglob("*.py")):
            file = path.relative_to(PACKAGE).as_posix()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or file in _OPEN_THEMSELVES:
                    continue
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                opens = called == "open" and not isinstance(node.func, ast.Attribute)
                if (called in ("read_text", "read_bytes") and isinstance(node.func, ast.Attribute)) or opens:
                    faults.append(f"{file}:{node.lineno} {called}")

    assert faults == []
