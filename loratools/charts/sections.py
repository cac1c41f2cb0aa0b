"""Layers of a heat map in sections: `down_blocks.1`, the middle, `up_blocks.0`, and the numbers within each.

A section is named once where it begins; within it a layer is a number or two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Section:
    """Layers that stand next to each other and whose names begin alike.

    Attributes:
        name: What their names begin with: the part of the model.
        start: The position of the first layer.
        labels: The numbers of each layer within the section, such as `3` or `0.1`; empty if there are none.
    """

    name: str
    start: int
    labels: tuple[str, ...]

    @property
    def stop(self) -> int:
        """The position behind the last layer."""
        return self.start + len(self.labels)


def sections(layers: Sequence[str]) -> tuple[Section, ...]:
    """Return the sections of layers in the order in which they stand.

    Example:
        >>> [(s.name, s.labels) for s in sections(["h.0", "h.1", "up.0.a.0.b.3", "up.0.a.1.b.3", "no layer"])]
        [('h', ('0', '1')), ('up.0', ('0.3', '1.3')), ('no layer', ('',))]
        >>> [(s.name, s.labels) for s in sections(["mid.a.0", "mid.a.0.b.7"])]
        [('mid', ('0', '0.7'))]
    """
    split = [_split(layer) for layer in layers]
    result = []
    start = 0
    for name, members in groupby(split, key=lambda pair: pair[0]):
        labels = tuple(label for _, label in members)
        result.append(Section(name, start, labels))
        start += len(labels)
    return tuple(result)


def _split(layer: str) -> tuple[str, str]:
    parts = layer.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    if not numbers:
        return layer, ""
    first = numbers[0]
    if first == 1:
        # `layers.3` is a layer of `layers`; `down_blocks.1.attentions.0` stands within `down_blocks.1`.
        end = 2 if len(numbers) > 1 else 1
    else:
        # `mid_block.attentions.0` stands within `mid_block`.
        end = max(1, first - 1)
    return ".".join(parts[:end]), ".".join(part for part in parts[end:] if part.isdecimal())
