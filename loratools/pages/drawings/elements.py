"""Elements of SVG as text: every attribute and every text escaped."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup, escape

from loratools.report.text import safe

# The width of a letter, on average, at the size of the labels; texts are laid out without measuring them.
_LETTER = 6.6


def element(name: str, *children: str, **attributes: str | float | None) -> Markup:
    """Return an element; of an attribute's name `_` stands for `-`, and `cls` is its class."""
    parts = [
        f' {"class" if key == "cls" else key.replace("_", "-")}="{escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    ]
    inner = "".join(escape(child) if isinstance(child, Markup) else escape(safe(child)) for child in children)
    return Markup(f"<{name}{''.join(parts)}>{inner}</{name}>")


def group(children: Iterable[Markup], **attributes: str | float | None) -> Markup:
    """Return elements as one."""
    return element("g", Markup("").join(children), **attributes)


def text(content: str, x: float, y: float, *, anchor: str = "start", cls: str | None = None) -> Markup:
    """Return a label whose base line begins, ends or has its middle at a point."""
    return element("text", content, x=x, y=y, text_anchor=anchor, cls=cls)


def picture(children: Iterable[Markup], width: float, height: float, *, title: str, unit: str, note: str) -> Markup:
    """Return a figure with a heading and a picture of the given size in pixels."""
    caption = element("figcaption", title, element("small", unit))
    drawing = element(
        "svg",
        Markup("").join(children),
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=f"{width:.0f}",
        height=f"{height:.0f}",
        role="img",
        aria_label=f"{title}: {unit}",
    )
    return element("figure", caption, drawing, *([element("p", note)] if note else []))


def width_of(label: str) -> float:
    """Return about how wide a label is, in pixels."""
    return _LETTER * len(label)


def clipped_label(label: str, most: int) -> str:
    """Return a label of at most `most` characters. Longer ones lose their beginning, since names differ at the end."""
    return label if len(label) <= most else f"…{label[1 - most :]}"


def number_text(value: float, *, percent: bool = False) -> str:
    """Return a number for an axis or a hover: four digits, or a percentage."""
    return f"{100 * value:.4g} %" if percent else f"{value:.4g}"


def _text(value: str | float) -> str:
    return safe(value) if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
