"""How values show themselves in a console: short, whatever their size.

A field is shown where it says something; a long collection is counted, and a text is cut off. What shows things at
full length is `report/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from pathlib import PurePath

_MOST_CHARACTERS = 60
_MOST_ITEMS = 4


def one_line(value: object) -> str:
    """Return a value in one line, with the fields that say something.

    `Module(name='model.layers.0.self_attn.q_proj', rank=8, shape=(48, 32))`: the fields that say something.
    """
    facts = ", ".join(f"{name}={text}" for name, text in _facts(value))
    return f"{type(value).__name__}({facts})"


def few_lines(value: object) -> str:
    """The name of the type, and below it a line for each field that says something."""
    facts = _facts(value)
    width = max((len(name) for name, _ in facts), default=0)
    return "\n".join([type(value).__name__, *(f"  {name:{width}}  {text}" for name, text in facts)])


def clipped(text: str, most: int = _MOST_CHARACTERS) -> str:
    """The text on one line, of at most `most` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def printable(text: str) -> str:
    """The text with everything that a terminal would obey or reorder by spelled as an escape.

    Names come from files: control characters could move the cursor, bidirectional marks could show another name.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def counted(count: int, noun: str) -> str:
    """Return a count with its noun in the right number: `1 module`, `28 modules`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _facts(value: object) -> list[tuple[str, str]]:
    # Fields of a dataclass, or of a named tuple.
    names: Iterable[str] = getattr(value, "__dataclass_fields__", getattr(value, "_fields", ()))
    pairs = ((name, getattr(value, name)) for name in names)
    return [(name, _short(item)) for name, item in pairs if item is not None and item != () and item != {}]


def _short(item: object) -> str:
    if isinstance(item, (bool, int)):
        return repr(item)
    if isinstance(item, float):
        return f"{item:.6g}"
    if isinstance(item, PurePath):
        return clipped(repr(str(item)))
    if isinstance(item, (str, bytes)) or not isinstance(item, Sized):
        return clipped(repr(item))
    if isinstance(item, (tuple, list)) and len(item) <= _MOST_ITEMS and all(_is_plain(each) for each in item):
        inner = ", ".join(map(_short, item))
        return f"({inner},)" if len(item) == 1 else f"({inner})"
    if isinstance(item, (tuple, list, set, frozenset, Mapping)) and not hasattr(item, "_fields"):
        kinds = {type(each).__name__ for each in (item.values() if isinstance(item, Mapping) else item)}
        kind = kinds.pop() if len(kinds) == 1 else "value"
        return f"<{len(item):,} × {kind}>"
    return clipped(repr(item), 2 * _MOST_CHARACTERS)


def _is_plain(item: object) -> bool:
    return item is None or isinstance(item, (bool, int, float, str))
