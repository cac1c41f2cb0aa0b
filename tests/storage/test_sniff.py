"""What a file really is, from its first bytes."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save

from loratools.storage.sniff import describe


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"content")
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model"))
    return buffer.getvalue()


def torch_saved(*, zip_container: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(1)}, buffer, _use_new_zipfile_serialization=zip_container)
    return buffer.getvalue()


def numpy_saved() -> bytes:
    buffer = io.BytesIO()
    numpy.savez(buffer, a=numpy.ones(1))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-LFS pointer, not the file itself"),
        (b"GGUF\3\0\0\0", "a GGUF file"),
        (torch_saved(zip_container=True), "a PyTorch pickle"),
        (torch_saved(zip_container=False), "a PyTorch pickle"),
        (pickle.dumps({"a": 1}), "a Python pickle"),
        (numpy_saved(), "a numpy archive (.npz)"),
        (zipped("readme.txt"), "a zip archive"),
        (tarred(), "a tar archive"),
        (gzip.compress(b"x", mtime=0), "a gzip archive"),
        (save({"a": torch.ones(1)}), "a safetensors file"),
        (bytes(100), "nothing but zeros, as a download leaves it that was cut off"),
        (b"  <!DOCTYPE HTML>\n<html>", "a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "an XML document"),
        (b'{"error": "Invalid credentials"}', 'a JSON text that begins \'{"error": "Invalid credentials"}\''),
        (b"Invalid username or password.", "a text that begins 'Invalid username or password.'"),
        (b"Evil\x1b[2Jtext that clears", None),
        (bytes(range(1, 200)), None),
        (b"\x10\0\0\0\0\0\0\0\x01\x02\x03", None),
    ],
    # Not by their bytes: what torch saves differs between two processes, and both must know the same tests.
    ids=lambda value: "bytes" if isinstance(value, bytes) else str(value),
)
def test_file_is_named_with_a_way_out(tmp_path: Path, data: bytes, what: str | None) -> None:
    found = describe(data)
    (tmp_path / "x").write_bytes(data)

    assert describe(tmp_path / "x") == found
    if what is None:
        assert found is None
    else:
        assert found is not None
        assert found.kind.startswith(what)
        assert found.hint
