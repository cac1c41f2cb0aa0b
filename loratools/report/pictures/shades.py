"""A number as a shade of colour, or as a character where there is no colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from rich.color import Color
from rich.style import Style

# Points of cividis, which is even in lightness and the same to people with any kind of colour blindness, and of
# ColorBrewer's PuOr, whose middle is neutral.
_SEQUENTIAL = ("00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "e1cc55", "fee838")
_DIVERGING = (
    "7f3b08",
    "b35806",
    "e08214",
    "fdb863",
    "fee0b6",
    "f7f7f7",
    "d8daeb",
    "b2abd2",
    "8073ac",
    "542788",
    "2d004b",
)
# From little to much; of two ways, letters go down and digits up from the neutral value.
_RAMP = ".:-=+*#%@"
_BELOW, _NEUTRAL, _ABOVE = "abcdefghi", ".", "123456789"


def shade(value: float, limits: tuple[float, float], *, diverging: bool) -> Style:
    """Return the style of a place with this number: its background, and letters that can be read on it."""
    red, green, blue = _colour_at(_share(value, limits), _DIVERGING if diverging else _SEQUENTIAL)
    light = 0.299 * red + 0.587 * green + 0.114 * blue > 127
    return Style(color="black" if light else "white", bgcolor=Color.from_rgb(red, green, blue))


def character(value: float, limits: tuple[float, float], *, diverging: bool) -> str:
    """Return the character that stands for a number where there are no colours."""
    share = _share(value, limits)
    if not diverging:
        return _RAMP[min(len(_RAMP) - 1, int(share * len(_RAMP)))]
    tenths = round((share - 0.5) * 2 * 9)
    return _NEUTRAL if not tenths else _ABOVE[tenths - 1] if tenths > 0 else _BELOW[-tenths - 1]


def characters(*, diverging: bool) -> str:
    """Return all characters that stand for numbers, from the lower limit to the upper."""
    return _BELOW[::-1] + _NEUTRAL + _ABOVE if diverging else _RAMP


def _share(value: float, limits: tuple[float, float]) -> float:
    return min(1.0, max(0.0, (value - limits[0]) / (limits[1] - limits[0])))


def _colour_at(share: float, points: Sequence[str]) -> tuple[int, int, int]:
    place = share * (len(points) - 1)
    start = min(math.floor(place), len(points) - 2)
    (low, high) = list(pairwise(_rgb(point) for point in points))[start]
    red, green, blue = (round(a + (b - a) * (place - start)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _rgb(point: str) -> tuple[int, int, int]:
    return int(point[:2], 16), int(point[2:4], 16), int(point[4:], 16)
