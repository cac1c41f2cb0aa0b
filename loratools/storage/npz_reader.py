"""Strict reader of .npz archives and their .npy headers, as numpy and MLX write them. No pickles, no numpy.

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html, versions 1 to 3. MLX has no name for
bfloat16 there and writes it as two opaque bytes, `V2`.
"""

from __future__ import annotations

import ast
import math
from pathlib import Path

from loratools.errors import FormatError, UnsupportedError
from loratools.hints import DAMAGED
from loratools.storage.files import identify, quoted, read_bytes
from loratools.storage.stored import StoredTensor, StridedTensor
from loratools.storage.stored_zip import StoredZip
from loratools.tensors.dtypes import DTYPE_BITS
from loratools.tensors.files import ByteRange, FileId
from loratools.tensors.lazy import LazyTensor

_MAGIC = b"\x93NUMPY"
# numpy itself refuses longer ones.
_MAX_HEADER = 10_000
_MAX_AXES = 8
_DTYPES = {
    "f2": "F16", "f4": "F32", "f8": "F64", "V2": "BF16", "b1": "BOOL", "i1": "I8", "i2": "I16", "i4": "I32",
    "i8": "I64", "u1": "U8", "u2": "U16", "u4": "U32", "u8": "U64", "c8": "C64",
}  # fmt: skip


def read_npz(path: Path) -> dict[str, LazyTensor]:
    """The arrays of an archive by name, as lazy tensors. Headers only.

    Raises:
        UsageError: There is no such file.
        UnsupportedError: An array of objects (a pickle), of texts or of records; a compressed archive.
        FormatError: It is no such archive, or a damaged one.
    """
    file = identify(path)
    archive = StoredZip(file)
    tensors: dict[str, LazyTensor] = {}
    for entry in archive.names:
        name = entry.removesuffix(".npy")
        if name == entry:
            raise FormatError(
                f"{quoted(path)} holds {quoted(entry)}, which is no array", hint="save it with numpy.savez"
            )
        tensors[name] = _array(file, name, archive.locate(entry))
    return tensors


def _array(file: FileId, name: str, place: ByteRange) -> LazyTensor:
    subject = f"the array {quoted(name)} of {quoted(file.path)}"
    first = read_bytes(place, 0, min(12, place.nbytes))
    version = first[6:7]
    if not first.startswith(_MAGIC) or len(first) < 12 or version not in (b"\x01", b"\x02", b"\x03"):
        raise FormatError(f"{subject} does not begin as an array does", hint=DAMAGED)
    width = 2 if version == b"\x01" else 4
    start = 8 + width
    length = int.from_bytes(first[8:start], "little")
    if length > _MAX_HEADER or start + length > place.nbytes:
        raise FormatError(f"{subject} declares a header of {length:,} bytes", hint=DAMAGED)
    dtype, shape, by_columns = _header(read_bytes(place, start, start + length), subject)
    offset = start + length
    nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
    if offset + nbytes != place.nbytes:
        raise FormatError(
            f"{subject} has {place.nbytes - offset:,} bytes, and {dtype} of shape {list(shape)} needs {nbytes:,}",
            hint=DAMAGED,
        )
    location = ByteRange(file, place.offset + offset, nbytes)
    if not by_columns or sum(n > 1 for n in shape) < 2:
        return LazyTensor(shape, dtype, StoredTensor(location, shape, dtype))
    strides = tuple(math.prod(shape[:axis]) for axis in range(len(shape)))
    return LazyTensor(shape, dtype, StridedTensor(location, shape, strides, dtype))


def _header(text: bytes, subject: str) -> tuple[str, tuple[int, ...], bool]:
    """Dtype, shape, and whether the first axis is the one that runs fastest."""
    try:
        fields = ast.literal_eval(text.decode("utf-8").strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise FormatError(f"{subject} has a header that cannot be read", hint=DAMAGED) from error
    if not isinstance(fields, dict) or fields.keys() != {"descr", "fortran_order", "shape"}:
        raise FormatError(f"{subject} has a header without descr, fortran_order and shape", hint=DAMAGED)
    descr, by_columns, shape = fields["descr"], fields["fortran_order"], fields["shape"]
    if (
        not isinstance(by_columns, bool)
        or not isinstance(shape, tuple)
        or len(shape) > _MAX_AXES
        or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
    ):
        raise FormatError(f"{subject} has the shape {str(shape)[:80]}", hint=DAMAGED)
    if isinstance(descr, str) and descr[1:] == "O":
        raise UnsupportedError(
            f"{subject} is a pickle of objects, which is not read", hint="save its numbers as arrays"
        )
    if not isinstance(descr, str) or descr[:1] not in ("<", "|") or descr[1:] not in _DTYPES:
        raise UnsupportedError(f"{subject} has values of type {str(descr)[:80]}, which are no numbers that are read")
    return _DTYPES[descr[1:]], shape, by_columns
