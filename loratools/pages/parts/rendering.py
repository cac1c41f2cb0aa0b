"""Contents as HTML: everything that comes from a file or a command line is escaped, in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.pages.parts.about import About
from loratools.pages.parts.contents import Contents
from loratools.report.fields import Field
from loratools.report.text import safe
from loratools.storage.ownership import MARK

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

# Characters; a longer one is broken into lines.
_LONGEST_NAME = 64
_TEMPLATES = Path(__file__).with_name("template")


def page(contents: Contents, about: About) -> str:
    """Return a whole document that needs no network and may fetch nothing.

    Its policy allows the one script and the one style sheet that it holds, by their hashes, so that nothing else runs
    even if it got past the escaping.
    """
    from markupsafe import Markup

    style, script = _text("page.css"), _text("page.js")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        _environment()
        .get_template("page.html")
        .render(contents=contents, about=about, policy=policy, mark=MARK, style=Markup(style), script=Markup(script))
    )


def fragment(contents: Contents) -> str:
    """Return the report without a page around it, for a notebook: no script, and styles for its own elements only."""
    from markupsafe import Markup

    return _environment().get_template("fragment.html").render(contents=contents, style=Markup(_text("fragment.css")))


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from loratools.pages.drawings.chart import drawn

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        # What a terminal would obey or reorder by, a browser may too; and control characters are no HTML.
        finalize=lambda value: safe(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.globals["sort_key"] = _sort_key
    environment.globals["cell_class"] = _cell_class
    environment.globals["picture"] = drawn
    return environment


def _cell_class(field: Field, text: str) -> str | Markup:
    """How a cell gives way: numbers and short names stay on one line, and a sentence gets room for some words."""
    from markupsafe import Markup

    if field.numeric:
        return Markup(' class="number"')
    if len(text) > _LONGEST_NAME:
        return Markup(' class="long"')
    return Markup(' class="name"') if " " not in text else ""


def _sort_key(field: Field, row: Mapping[str, object]) -> str | Markup:
    """The number by which a cell is sorted, as an attribute; nothing where the text itself says it."""
    from markupsafe import Markup

    value = row.get(field.key)
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    if not field.numeric or isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return ""
    return Markup(' data-value="{}"').format(f"{value:.12g}")


def _text(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    import base64
    import hashlib

    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}"
