"""The checksum of written bytes does not depend on how they are cut, and shows what disks do to them."""

from __future__ import annotations

from hashlib import blake2b

import pytest

np = pytest.importorskip("numpy")

from loratools.storage.checksum import Checksum  # noqa: E402

PIECE = 65536


def by_hand(data: bytes) -> str:
    """As the docstring says it, in integers."""
    digest = blake2b(digest_size=16)
    whole = len(data) // PIECE * PIECE
    sums = []
    for start in range(0, len(data), PIECE):
        piece = data[start : start + PIECE]
        piece += bytes(-len(piece) % 8)
        sums.append(sum(int.from_bytes(piece[i : i + 8], "little") for i in range(0, len(piece), 8)) % 2**64)
    last = sums.pop() if whole != len(data) else 0
    for value in [*sums, last, len(data)]:
        digest.update(value.to_bytes(8, "little"))
    return digest.hexdigest()


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1000, PIECE - 1, PIECE, PIECE + 3, 3 * PIECE + 12345])
def test_it_is_the_sums_of_pieces_however_they_are_added(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    expected = by_hand(data)
    for step in (1 if size < 2000 else 999, 64, 4096, 70000, max(size, 1)):
        checksum = Checksum()
        for start in range(0, size, step):
            checksum.add(memoryview(data)[start : start + step])
        assert checksum.hexdigest() == expected


@pytest.mark.parametrize("damage", ["a bit", "a page of zeros", "the end", "two pieces swapped", "a byte more"])
def test_what_disks_do_changes_it(damage: str) -> None:
    data = bytearray(np.random.default_rng(5).integers(1, 256, 4 * PIECE + 100, dtype=np.uint8).tobytes())
    before = by_hand(bytes(data))
    if damage == "a bit":
        data[200_000] ^= 16
    elif damage == "a page of zeros":
        data[8192:12288] = bytes(4096)
    elif damage == "the end":
        del data[-1]
    elif damage == "a byte more":
        data.append(0)
    else:
        data[:PIECE], data[PIECE : 2 * PIECE] = data[PIECE : 2 * PIECE], data[:PIECE]
    checksum = Checksum()
    checksum.add(memoryview(bytes(data)))

    assert checksum.hexdigest() != before
