"""Numbers of modules as a map of layers and kinds of modules: where in a model something is large.

`model.layers.3.self_attn.q_proj` is in row `layers.3` and column `q_proj`. Experts of one layer share a column, in
which their mean stands.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loratools.charts.values import HeatMap

# Where modules stand that are in no layer, such as `lm_head`.
NO_LAYER = "no layer"
# Words after which a number counts layers; after others (`to_out.0`, `net.2`) it belongs to the module.
_CONTAINER = re.compile(
    r"(?:^|_)(?:layers?|blocks?|h|attentions|resnets|stages?|downsamplers|upsamplers|motion_modules|layer_module)$"
)
_EXPERT = re.compile(r"\b(experts|shared_experts)\.\d+")
# `attn1.to_q` is one of several attentions, though a file may have modules of one only.
_COUNTS = re.compile(r"[\d*]+\.|\.[\d*]")
_DIGITS = re.compile(r"(\d+)")
# The end of a name whose dots a trainer wrote as underscores: numbers still tell where parts begin.
_UNDERSCORED_NUMBER = re.compile(r"_(\d+)(?=_|$)")
# The order in which people name the modules of a layer, by the last word that counts.
_USUAL = (
    ("qkv", "qkv_proj", "query_key_value", "c_attn", "in_proj"),
    ("q", "q_proj", "to_q", "query", "wq", "q_lin"),
    ("k", "k_proj", "to_k", "key", "wk", "k_lin"),
    ("v", "v_proj", "to_v", "value", "wv", "v_lin"),
    ("o", "o_proj", "to_out", "out_proj", "wo", "out_lin", "dense"),
    ("gate", "gate_proj", "w1", "gate_up_proj"),
    ("up", "up_proj", "w3", "fc1", "c_fc"),
    ("down", "down_proj", "w2", "fc2"),
)
_PLACE_OF_WORD = {word: place for place, words in enumerate(_USUAL) for word in words}


@dataclass(frozen=True)
class Cell:
    """Where a module stands in a map.

    Attributes:
        row: Its layer.
        column: Its kind within the layer.
    """

    row: str
    column: str


def cells(names: Sequence[str]) -> list[Cell]:
    """Return where each module stands in a map of them all, in the order of the names."""
    dotted = [_dotted(name) for name in names]
    # A layer of a T5 has numbered layers of its own, which are kinds; a block of a U-Net has numbered layers, which are
    # not. The better of the two readings leaves fewer places of the map empty.
    outer, inner = ([_split(name, last=last) for name in dotted] for last in (False, True))
    rows_and_tails = outer if _fill(outer) > _fill(inner) else inner
    rows = _without_common_start([row for row, _ in rows_and_tails])
    columns = _short([tail for _, tail in rows_and_tails])
    return [Cell(row, column) for row, column in zip(rows, columns, strict=True)]


def module_map(
    numbers: Iterable[tuple[str, float | None]],
    *,
    title: str,
    unit: str,
    limits: tuple[float, float] | None = None,
    neutral: float | None = None,
    note: str = "",
) -> HeatMap | None:
    """Return the heat map of a number per module; None if fewer than two modules have one.

    Args:
        numbers: The name of each module, and its number; None if it has none.
        title: What is shown.
        unit: What a number is.
        limits: The ends of the colour scale; from the numbers if None.
        neutral: The number from which the others go two ways, in the middle of the colour scale.
        note: How to read it.
    """
    pairs = [(name, None if value is None or not math.isfinite(value) else value) for name, value in numbers]
    if sum(value is not None for _, value in pairs) < 2:
        return None
    places = cells([name for name, _ in pairs])
    in_cell: dict[Cell, list[float]] = {}
    for place, (_, value) in zip(places, pairs, strict=True):
        in_cell.setdefault(place, [])
        if value is not None:
            in_cell[place].append(value)
    rows = sorted({place.row for place in places}, key=_row_order)
    columns = sorted({place.column for place in places}, key=column_order)
    values = tuple(tuple(_mean(in_cell.get(Cell(row, column), [])) for column in columns) for row in rows)
    several = any(len(each) > 1 for each in in_cell.values())
    notes = [note, "A column with * shows the mean of several modules of a layer."] if several else [note]
    shown = [value for row in values for value in row if value is not None]
    return HeatMap(
        title=title,
        unit=unit,
        rows=tuple(rows),
        columns=tuple(columns),
        values=values,
        diverging=neutral is not None,
        limits=limits or limits_of(shown, neutral=neutral),
        note=" ".join(filter(None, notes)),
    )


def limits_of(numbers: Sequence[float], *, neutral: float | None = None) -> tuple[float, float]:
    """Return the ends of a colour scale: from 0 to the largest, or as far to either side of the neutral number."""
    if neutral is not None:
        # Where all are at the neutral number, to rounding, rounding is not to fill the scale.
        reach = max([0.01, *(abs(number - neutral) for number in numbers)])
        return neutral - reach, neutral + reach
    low, high = min([0.0, *numbers]), max([0.0, *numbers])
    return (low, high) if low < high else (0.0, 1.0)


def _dotted(name: str) -> str:
    name = name.removesuffix(".weight")
    return name if "." in name else _UNDERSCORED_NUMBER.sub(r".\1.", name).replace("._", ".").rstrip(".")


def _split(name: str, *, last: bool) -> tuple[str, str]:
    """The layer of a module, up to the first or last number that counts layers, and the rest of its name."""
    parts = name.split(".")
    ends = []
    counts = False
    for i, part in enumerate(parts):
        counts = part.isdecimal() and i > 0 and (counts or bool(_CONTAINER.search(parts[i - 1])))
        if counts and i + 1 < len(parts):
            ends.append(i + 1)
    if not ends:
        return NO_LAYER, _EXPERT.sub(r"\1.*", name)
    end = ends[-1 if last else 0]
    return ".".join(parts[:end]), _EXPERT.sub(r"\1.*", ".".join(parts[end:]))


def _fill(split: Sequence[tuple[str, str]]) -> float:
    """The share of the places of a map that are not empty."""
    in_layers = {pair for pair in split if pair[0] != NO_LAYER}
    places = len({row for row, _ in in_layers}) * len({tail for _, tail in in_layers})
    return len(in_layers) / places if places else 1.0


def _without_common_start(rows: Sequence[str]) -> list[str]:
    """The rows without the words that all begin with, but for the last before their numbers."""
    starts = [row.split(".")[: _first_number(row) - 1] for row in rows if row != NO_LAYER]
    shared = 0
    while starts and all(len(s) > shared for s in starts) and len({s[shared] for s in starts}) == 1:
        shared += 1
    return [row if row == NO_LAYER else ".".join(row.split(".")[shared:]) for row in rows]


def _first_number(row: str) -> int:
    return next(i for i, part in enumerate(row.split(".")) if part.isdecimal())


def _short(tails: Sequence[str]) -> list[str]:
    """Names of kinds by their last word, where it is that of one kind alone and counts nothing."""
    last_words = {tail: tail.rpartition(".")[2] for tail in tails}
    uses = Counter(last_words.values())
    return [last_words[tail] if uses[last_words[tail]] == 1 and not _COUNTS.search(tail) else tail for tail in tails]


def natural(label: str) -> tuple[tuple[bool, int, str], ...]:
    """Return what sorts labels so that layer 2 comes before layer 10."""
    return tuple((part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in _DIGITS.split(label))


def _row_order(row: str) -> tuple[bool, int, tuple[tuple[bool, int, str], ...]]:
    # A U-Net goes down, through the middle, and up.
    stage = next((i for i, word in enumerate(("down", "input", "mid", "up", "output")) if word in row), -1)
    return row == NO_LAYER, stage, natural(row)


def column_order(column: str) -> tuple[bool, str, int, tuple[tuple[bool, int, str], ...]]:
    """Return what sorts kinds of modules as people name them: attention first, then q before k."""
    parts = column.split(".")
    place = next((_PLACE_OF_WORD[part] for part in reversed(parts) if part in _PLACE_OF_WORD), len(_USUAL))
    attention = any("attn" in part or "attention" in part for part in parts) or place <= 4
    return not attention, ".".join(parts[:1] if len(parts) > 1 else ()), place, natural(column)


def _mean(numbers: Sequence[float]) -> float | None:
    return math.fsum(numbers) / len(numbers) if numbers else None
