"""How names and numbers are spelled for people. Knows nothing of colours or tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from loratools.short_repr import printable

# One character for one character, so that columns stay aligned. U+2500 to U+257F draw boxes.
_ASCII: dict[int, int | str] = {
    **dict.fromkeys(range(0x2500, 0x2580), "+"),
    **dict.fromkeys(map(ord, "─━═╌╍┄┅┈┉"), "-"),
    **dict.fromkeys(map(ord, "│┃║╎╏┆┇┊┋"), "|"),
    **str.maketrans("×…–→·≈—•▁▂▃▄▅▆▇█", "x~->.~-*_.-=+*%#"),
}


def safe(text: str) -> str:
    """Return `text` with everything that a terminal would obey or reorder by spelled as an escape."""
    return printable(text)


def ascii_only(text: str) -> str:
    """Return `text` with our own typographic characters replaced, for an output that cannot show them."""
    return text.translate(_ASCII)


def size(nbytes: float) -> str:
    """Return a size in words: `160 MB`, three digits, powers of 1000 as on disk labels and in `--max-size`."""
    value = float(nbytes)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:,.0f} {unit}" if unit == "bytes" or value >= 99.95 else f"{value:.3g} {unit}"


def number(value: float | None) -> str:
    """Return a number with four significant digits: `2`, `0.125`, `5.657`, `1.3e-05`, or `not finite`."""
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e7 else f"{value:.4g}"


def interval(values: Iterable[float | None]) -> str:
    """Return the range of some numbers: `0.91–1.2`, or `0.91` where that is all there is. Values that are not
    finite are left out."""
    finite = sorted(v for v in values if v is not None and math.isfinite(v))
    if not finite:
        return "–"
    low, high = f"{finite[0]:.3g}", f"{finite[-1]:.3g}"
    return low if low == high else f"{low}–{high}"


def shape(sizes: Sequence[int | None]) -> str:
    """Return a shape in words: `4096×11008`; `scalar` for a tensor without axes."""
    return "×".join("?" if size is None else str(size) for size in sizes) or "scalar"


def plural(count: int, word: str) -> str:
    """Return a count with its noun in the right number: `1 module`, `224 modules`."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def ranks(numbers: Iterable[int]) -> str:
    """Return ranks in words: `rank 8`, `ranks 2–16`."""
    distinct = sorted(set(numbers))
    return (
        f"rank {distinct[0]}"
        if len(distinct) == 1
        else f"ranks {distinct[0]}–{distinct[-1]}"
        if distinct
        else "no rank"
    )
