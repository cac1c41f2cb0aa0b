"""The header of a safetensors file as columns: one list of names, one of dtypes, and so on, without an object each.

Every writer in use spells an entry alike, so that one pattern takes a header apart in a fraction of the time of a JSON
parser and of the checks of each of its objects. What is spelled otherwise, in any way, or is not sound, is None here:
the reader parses it again, object by object, and says what is wrong.
"""

from __future__ import annotations

import math
import re
from itertools import accumulate
from operator import le, sub
from typing import NamedTuple, TypeVar

from loratools.errors import FormatError
from loratools.storage.json_file import parse_json
from loratools.tensors.dtypes import DTYPE_BITS

# No quote, backslash or control character in a name: it then stands in the header as it is. Numbers of at most 18
# digits are below 2^63.
_COUNT = r"(?:0|[1-9][0-9]{0,17})"
_ENTRY = re.compile(
    r'"([^"\\\x00-\x1f]{0,4096})": ?'
    rf'\{{"dtype": ?"([A-Z0-9_]+)", ?"shape": ?\[((?:{_COUNT}(?:, ?{_COUNT}){{0,7}})?)\], ?'
    rf'"data_offsets": ?\[({_COUNT}), ?({_COUNT})\]\}}'
)
_METADATA = "__metadata__"
_Item = TypeVar("_Item")
_MOST_ELEMENTS = (1 << 63) - 1


class HeaderColumns(NamedTuple):
    """What a header says: an item of each list for each tensor, in the order of their bytes in the file.

    Attributes:
        names: The names, all different.
        dtypes: The dtypes, as safetensors spells them.
        shapes: The shapes.
        begins: Where the bytes begin, from the end of the header on.
        sizes: How many bytes there are, which is what dtype and shape need.
        metadata: The value of `__metadata__`, unchecked; None if there is none.
    """

    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    begins: list[int]
    sizes: list[int]
    metadata: object

    @property
    def nbytes(self) -> int:
        """How many bytes all tensors have."""
        return sum(self.sizes)


def header_columns(header: bytes) -> HeaderColumns | None:
    """The columns of a header in the usual spelling whose tensors leave no gap between them; None of any other."""
    try:
        # Before, between and behind the entries, with the five parts of each.
        pieces = _ENTRY.split(header.decode("utf-8").rstrip(" "))
    except UnicodeDecodeError:
        return None
    if len(pieces) == 1 or not {*pieces[6:-1:6]} <= {",", ", "}:
        return None
    metadata = _metadata(pieces[0], pieces[-1])
    names = pieces[1::6]
    if metadata is _UNUSUAL or len({*names}) != len(names) or _METADATA in names:
        return None
    dtypes, spelled_shapes = pieces[2::6], pieces[3::6]
    begins, ends = [*map(int, pieces[4::6])], [*map(int, pieces[5::6])]
    # Of 90,000 tensors there are a handful of dtypes and shapes, which are checked once each.
    parsed_shapes = {spelled: tuple(map(int, spelled.split(","))) if spelled else () for spelled in {*spelled_shapes}}
    needed: dict[tuple[str, str], int] = {}
    for dtype, spelled in {*zip(dtypes, spelled_shapes, strict=True)}:
        bits, shape = DTYPE_BITS.get(dtype), parsed_shapes[spelled]
        # Also where an axis is 0, readers that multiply from the left must not overflow.
        if bits is None or math.prod(axis or 1 for axis in shape) > _MOST_ELEMENTS or math.prod(shape) * bits % 8:
            return None
        needed[dtype, spelled] = math.prod(shape) * bits // 8
    sizes = [*map(sub, ends, begins)]
    if sizes != [*map(needed.__getitem__, zip(dtypes, spelled_shapes, strict=True))]:
        return None
    shapes = [*map(parsed_shapes.__getitem__, spelled_shapes)]
    columns = HeaderColumns(names, dtypes, shapes, begins, sizes, metadata)
    if not all(map(le, begins, begins[1:])):
        order = sorted(range(len(names)), key=lambda i: (begins[i], ends[i]))
        columns = HeaderColumns(
            _ordered(names, order),
            _ordered(dtypes, order),
            _ordered(shapes, order),
            _ordered(begins, order),
            _ordered(sizes, order),
            metadata,
        )
    # Each begins where the one before it ends.
    return columns if columns.begins == [*accumulate(columns.sizes[:-1], initial=0)] else None


def _ordered(column: list[_Item], order: list[int]) -> list[_Item]:
    return [*map(column.__getitem__, order)]


_UNUSUAL = object()


def _metadata(before: str, behind: str) -> object:
    """The value of `__metadata__`, which stands before or behind all tensors; `_UNUSUAL` where anything else does."""
    if behind == "}" and before == "{":
        return None
    member = before[1:].rstrip(" ").removesuffix(",") if behind == "}" else behind[:-1].removeprefix(",")
    one_side = before == "{" if behind != "}" else before.rstrip(" ").endswith(",")
    if not one_side or before[:1] != "{" or behind[-1:] != "}":
        return _UNUSUAL
    try:
        members = parse_json(f"{{{member}}}".encode(), "the header")
    except FormatError:
        return _UNUSUAL
    if not isinstance(members, dict) or [*members] != [_METADATA]:
        return _UNUSUAL
    return members[_METADATA]
