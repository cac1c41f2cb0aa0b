"""Where the entries of an uncompressed zip archive lie, from its directory; nothing is unpacked.

Format: APPNOTE 6.3 sections 4.3.7, 4.3.12 and 4.3.14 to 4.3.16. Refused: what two readers could read in two ways
(names given twice, overlapping entries, local names that differ) and whatever could unpack to more than it is.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from loratools.errors import FormatError, UnsupportedError
from loratools.hints import DAMAGED
from loratools.storage.files import quoted, read_bytes
from loratools.tensors.files import ByteRange, FileId

_MAX_DIRECTORY = 64 << 20
_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")


@dataclass(frozen=True)
class _Entry:
    name: str
    header: int
    nbytes: int


class StoredZip:
    """The entries of a zip archive, each found where it lies when it is asked for."""

    def __init__(self, file: FileId) -> None:
        self.file = file
        self._directory_start, directory, count = _directory(file)
        self._entries = _entries(file, directory, count, self._directory_start)
        if not self._entries:
            raise FormatError(f"{quoted(file.path)} is a zip archive without entries", hint=DAMAGED)
        starts = sorted(entry.header for entry in self._entries.values())
        # An entry ends where the next one begins at the latest, so that no byte belongs to two.
        self._limits = dict(zip(starts, [*starts[1:], self._directory_start], strict=True))
        if len(self._limits) != len(starts):
            raise FormatError(f"two entries of {quoted(file.path)} lie at the same place", hint=DAMAGED)

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def locate(self, name: str) -> ByteRange:
        """Where the content of an entry lies; KeyError for an unknown name."""
        entry = self._entries[name]
        limit = self._limits[entry.header]
        header = self._read(entry.header, _LOCAL.size, limit, name)
        signature, _, _, method, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack(header)
        local_name = self._read(entry.header + _LOCAL.size, name_length, limit, name)
        if signature != b"PK\x03\x04" or method != 0 or local_name != name.encode("utf-8"):
            raise FormatError(
                f"the entry {quoted(name)} of {quoted(self.file.path)} is not where it should be", hint=DAMAGED
            )
        start = entry.header + _LOCAL.size + name_length + extra_length
        if start + entry.nbytes > limit:
            raise FormatError(
                f"the entry {quoted(name)} of {quoted(self.file.path)} has {entry.nbytes:,} bytes from {start:,} on, "
                f"and the next begins at {limit:,}",
                hint=DAMAGED,
            )
        return ByteRange(self.file, start, entry.nbytes)

    def _read(self, start: int, count: int, limit: int, name: str) -> bytes:
        if start + count > limit:
            raise FormatError(f"the entry {quoted(name)} of {quoted(self.file.path)} is cut off", hint=DAMAGED)
        return read_bytes(ByteRange(self.file, start, count))


def _directory(file: FileId) -> tuple[int, bytes, int]:
    """Where the directory begins, its bytes, and how many entries it claims."""
    # The end record is last, but for a comment of up to 65535 bytes.
    tail_start = max(0, file.size - _END.size - 0xFFFF - _END64_LOCATOR.size)
    tail = read_bytes(ByteRange(file, tail_start, file.size - tail_start))
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise FormatError(f"{quoted(file.path)} is a zip archive without its end", hint=DAMAGED)
    _, disk, _, _, count, size, start, comment = _END.unpack_from(tail, at)
    end = tail_start + at
    if end + _END.size + comment != file.size:
        raise FormatError(f"{quoted(file.path)} has bytes after its end as a zip archive", hint=DAMAGED)
    locator = at - _END64_LOCATOR.size
    if locator >= 0 and tail[locator : locator + 4] == b"PK\x06\x07":
        _, _, end64, _ = _END64_LOCATOR.unpack_from(tail, locator)
        if end64 + _END64.size > end:
            raise FormatError(f"{quoted(file.path)} has a damaged zip directory", hint=DAMAGED)
        record = read_bytes(ByteRange(file, end64, _END64.size))
        signature, _, _, _, disk, _, _, count, size, start = _END64.unpack(record)
        if signature != b"PK\x06\x06":
            raise FormatError(f"{quoted(file.path)} has a damaged zip directory", hint=DAMAGED)
        end = end64
    if disk not in (0, 0xFFFF):
        raise UnsupportedError(f"{quoted(file.path)} is one part of a zip archive in several files")
    if start + size > end or size > _MAX_DIRECTORY:
        raise FormatError(f"{quoted(file.path)} has a damaged zip directory", hint=DAMAGED)
    return start, read_bytes(ByteRange(file, start, size)), count


def _entries(file: FileId, directory: bytes, count: int, directory_start: int) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    at = 0
    while at < len(directory):
        if at + _CENTRAL.size > len(directory):
            raise FormatError(f"{quoted(file.path)} has a damaged zip directory", hint=DAMAGED)
        fields = _CENTRAL.unpack_from(directory, at)
        signature, flags, method, packed, size = fields[0], *fields[3:5], *fields[8:10]
        name_length, extra_length, comment_length, header = *fields[10:13], fields[16]
        at += _CENTRAL.size
        raw_name = directory[at : at + name_length]
        extra = directory[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length + comment_length
        if signature != b"PK\x01\x02" or at > len(directory):
            raise FormatError(f"{quoted(file.path)} has a damaged zip directory", hint=DAMAGED)
        try:
            name = raw_name.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"an entry of {quoted(file.path)} has a name that is not UTF-8", hint=DAMAGED) from error
        size, packed, header = _sizes64(extra, size, packed, header)
        subject = f"the entry {quoted(name)} of {quoted(file.path)}"
        if name in entries:
            raise FormatError(f"{subject} is there twice", hint=DAMAGED)
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise FormatError(f"{subject} would lie outside of the archive", hint="do not trust this file")
        if flags & 1:
            raise UnsupportedError(f"{subject} is encrypted")
        if method != 0 or packed != size:
            raise UnsupportedError(
                f"{subject} is compressed", hint="repack it without compression, as torch.save and numpy.savez write it"
            )
        if header >= directory_start:
            raise FormatError(f"{subject} begins at byte {header:,}, after the archive's directory", hint=DAMAGED)
        entries[name] = _Entry(name, header, size)
    if count != len(entries):
        raise FormatError(f"{quoted(file.path)} declares {count:,} entries and has {len(entries):,}", hint=DAMAGED)
    return entries


def _sizes64(extra: bytes, *fields: int) -> tuple[int, ...]:
    """The fields that did not fit 32 bits, from the extra record 1, which holds only those, in this order."""
    values = list(fields)
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        record = extra[at + 4 : at + 4 + length]
        at += 4 + length
        if kind == 1:
            for index, value in enumerate(values):
                if value == 0xFFFFFFFF and len(record) >= 8:
                    values[index] = int.from_bytes(record[:8], "little")
                    record = record[8:]
            break
    return tuple(values)
