"""A checksum of bytes as they are written, at the speed of memory: sums of 64-bit numbers over pieces of 64 KiB.

It is there to notice what crashes and disks do to bytes (pages that were never written, bits that changed), at a
thirtieth of the cost of a cryptographic digest, which would be a fifth of the work of a merge. It is no protection
against somebody who changes bytes on purpose.
"""

from __future__ import annotations

# Bytes whose sum is one number of the digest.
_PIECE = 1 << 16
_WORD = 8
# What was written is read back in pieces of this size.
_READ_BACK = 1 << 20
_MASK = (1 << 64) - 1


class Checksum:
    """The checksum of what is added to it; how the bytes are cut into calls makes no difference."""

    def __init__(self) -> None:
        from hashlib import blake2b

        self._digest = blake2b(digest_size=16)
        self._sum = 0
        # Bytes that are in `_sum`, of the piece at hand.
        self._summed = 0
        self._length = 0
        # The beginning of a 64-bit number whose other bytes have not come yet.
        self._partial_word = b""

    def add(self, data: memoryview) -> None:
        """Take in the next bytes."""
        self._length += len(data)
        if self._partial_word:
            missing = min(_WORD - len(self._partial_word), len(data))
            self._partial_word, data = self._partial_word + bytes(data[:missing]), data[missing:]
            if len(self._partial_word) < _WORD:
                return
            word, self._partial_word = memoryview(self._partial_word), b""
            self._add_words(word)
        complete = len(data) // _WORD * _WORD
        self._add_words(data[:complete])
        self._partial_word = bytes(data[complete:])

    def add_written(self, fd: int, start: int, nbytes: int) -> None:
        """Take in bytes that were written to an open file from `start` on, read back.

        Raises:
            MachineError: The file ends before, or the disk failed.
        """
        from loratools.storage.files import read_back

        buffer = memoryview(bytearray(min(nbytes, _READ_BACK)))
        for position in range(0, nbytes, _READ_BACK):
            piece = buffer[: nbytes - position]
            read_back(fd, piece, start + position)
            self.add(piece)

    def hexdigest(self) -> str:
        """The checksum of all that was added."""
        digest = self._digest.copy()
        last = (self._sum + int.from_bytes(self._partial_word, "little")) & _MASK
        digest.update(last.to_bytes(_WORD, "little") + self._length.to_bytes(_WORD, "little"))
        return digest.hexdigest()

    def _add_words(self, data: memoryview) -> None:
        import numpy as np

        while len(data):
            piece = data[: _PIECE - self._summed]
            words = np.frombuffer(piece, "<u8")
            self._sum = (self._sum + int(np.add.reduce(words))) & _MASK
            self._summed += len(piece)
            data = data[len(piece) :]
            if self._summed == _PIECE:
                self._digest.update(self._sum.to_bytes(_WORD, "little"))
                self._sum = self._summed = 0
