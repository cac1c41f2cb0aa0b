"""What a file really is, whatever its name says, from its first bytes. Nothing is opened further or unpacked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from loratools.storage.files import identify, quoted, read_bytes
from loratools.tensors.files import ByteRange

# Enough for the names of the first entries of a zip and for the mark of a tar at byte 257.
ENOUGH = 1024


class Sniffed(NamedTuple):
    kind: str
    hint: str


_DOWNLOAD_AGAIN = "download it again; a browser or curl needs the address with /resolve/, not /blob/, and -L"
_UNPACK = "unpack it first, and give the model file inside"
_PICKLE = "convert it to safetensors: loratools convert, under its right name (.bin, .pt, .pth or .ckpt)"


def describe(source: Path | bytes) -> Sniffed | None:
    """What the file, or the file with these first bytes, is, with what to do about it; None if nothing is known."""
    if isinstance(source, Path):
        file = identify(source)
        source = read_bytes(ByteRange(file, 0, min(file.size, ENOUGH)))
    return _describe(source)


def _describe(first: bytes) -> Sniffed | None:
    if not first:
        return Sniffed("an empty file", _DOWNLOAD_AGAIN)
    for magic, kind, hint in _MAGIC:
        if first.startswith(magic):
            return Sniffed(kind, hint)
    if first.startswith(b"PK\x03\x04"):
        return _zip(first)
    if len(first) > 8 and first[8:9] == b"{" and 2 <= int.from_bytes(first[:8], "little") <= 100_000_000:
        return Sniffed("a safetensors file", "give it the suffix .safetensors")
    # Protocol 2 and later name themselves; the whole of a legacy torch file begins with the magic number as a pickle.
    if first[0] == 0x80 and len(first) > 1 and 2 <= first[1] <= 5:
        torch_magic = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
        return Sniffed("a PyTorch pickle" if torch_magic in first[:32] else "a Python pickle", _PICKLE)
    if first[257:262] == b"ustar":
        return Sniffed("a tar archive", _UNPACK)
    if not first.strip(b"\0"):
        return Sniffed("nothing but zeros, as a download leaves it that was cut off", _DOWNLOAD_AGAIN)
    return _text(first)


_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a git-LFS pointer, not the file itself", "run 'git lfs pull' in its folder"),
    (b"version https://hawser", "a git-LFS pointer, not the file itself", "run 'git lfs pull' in its folder"),
    (b"GGUF", "a GGUF file", "give it the suffix .gguf"),
    (b"FUGG", "a big-endian GGUF file", "convert it to little-endian first"),
    (b"ggjt", "a GGML file, the forerunner of GGUF", "convert it with llama.cpp first"),
    (b"tjgg", "a GGML file, the forerunner of GGUF", "convert it with llama.cpp first"),
    (b"\x93NUMPY", "a numpy array (.npy)", "save it as safetensors with names"),
    (b"\x89HDF", "an HDF5 file", "load it with the program it comes from, and save it as safetensors"),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ", "an xz archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive", _UNPACK),
    (b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"PK\x05\x06", "an empty zip archive", _DOWNLOAD_AGAIN),
    (b"%PDF", "a PDF document", _DOWNLOAD_AGAIN),
    (b"\x89PNG", "a PNG image", _DOWNLOAD_AGAIN),
    (b"\xff\xd8\xff", "a JPEG image", _DOWNLOAD_AGAIN),
    (b"PAR1", "a Parquet table", "give the model file instead"),
    (b"\x7fELF", "a program", "give the model file instead"),
    (b"#!", "a script", "give the model file instead"),
)


def _zip(first: bytes) -> Sniffed:
    # The name of the first entry is at byte 30 of its header.
    name = first[30 : 30 + int.from_bytes(first[26:28], "little")]
    if re.search(rb"(^|/)(data\.pkl|byteorder|\.format_version|data/\d+|version|constants\.pkl)$", name):
        return Sniffed("a PyTorch pickle", _PICKLE)
    if name.endswith(b".npy"):
        return Sniffed("a numpy archive (.npz)", "give it the suffix .npz, or save it as safetensors")
    return Sniffed("a zip archive", _UNPACK)


def _text(first: bytes) -> Sniffed | None:
    if first.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Sniffed("a text in UTF-16", _DOWNLOAD_AGAIN)
    text = first.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="ignore").lstrip()
    lower = text[:200].lower()
    if re.match(r"<!doctype html|<html|<head|<!--", lower):
        return Sniffed("a web page", _DOWNLOAD_AGAIN)
    if lower.startswith("<?xml"):
        return Sniffed("an XML document, as a server sends to say that something went wrong", _DOWNLOAD_AGAIN)
    # A short line that says so is kinder than our guess: 'Entry not found', 'Access to model … is restricted'.
    line = text.split("\n")[0].rstrip("\r")[:120]
    if re.match(r'[{[]\s*["\]}\[{]', text) and first[:1] in b"{[ \n\r\t\xef":
        return Sniffed(f"a JSON text that begins {quoted(line)}", _DOWNLOAD_AGAIN)
    readable = sum(c.isprintable() or c in "\r\n\t" for c in text)
    if len(text) >= 8 and readable == len(text) and len(text.encode()) >= len(first) - 8:
        return Sniffed(f"a text that begins {quoted(line)}", _DOWNLOAD_AGAIN)
    return None
