"""What a notebook shows of a value: the fragment that the pages have of it.

Values of the lower layers know nothing of HTML. The layer that shows things is asked for by its name, and only when a
notebook asks.
"""

from __future__ import annotations

from importlib import import_module


def notebook_html(self: object) -> str | None:
    """Return a report or an adapter as HTML for a notebook; None without Jinja2, so that its text is shown."""
    try:
        fragment = import_module("loratools.pages.parts.rendering").fragment
        contents_of = import_module("loratools.pages.parts.dispatch").contents_of
        html: str = fragment(contents_of(self))
    except ModuleNotFoundError as error:
        if error.name != "jinja2":
            raise
        return None
    return html
