"""The page of one method: its description, what holds of it, and its options."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

_WIDTH = 100
# By the fields of `methods.Laws`: what is said where the law holds, and where it does not.
_LAWS = {
    "order_free": ("The order of the adapters does not matter.", "The order of the adapters matters."),
    "ignores_split": (
        "Only the deltas matter, not how each is split into A and B.",
        "How each delta is split into A and B matters.",
    ),
    "rotation_equivariant": (
        "It commutes with rotations of the inputs and outputs, so that it is exact in small coordinates.",
        "It depends on the coordinates of the weights.",
    ),
    "keeps_one": ("One adapter alone, at weight 1, is unchanged.", "One adapter alone, at weight 1, is changed."),
    "negative_weights": ("Weights may be negative.", "Weights must not be negative."),
}


def method_page(entry: Mapping[str, Any]) -> str:
    """The text for people about a method.

    Args:
        entry: Name, description, use, avoid, options (name, default, range, about) and laws, as `loratools methods
            --json` has it.
    """
    lines = [entry["name"], "", *entry["description"].splitlines(), ""]
    lines += ["When to use it:", *_indented(entry["use"]), *_indented(entry["avoid"]), ""]
    lines += ["Properties:"]
    lines += [f"  {_LAWS[law][0 if holds else 1]}" for law, holds in entry["laws"].items()]
    lines += ["", "Options:"] if entry["options"] else ["", "It has no options."]
    for option in entry["options"]:
        lines += [f"  --set {option['name']}={option['default']}", f"      {option['about']} ({option['range']})"]
    lines += ["", "Example:", f"  loratools combine first=0.7 second=0.3 -o both --method {entry['name']}"]
    return "\n".join(lines)


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, width=_WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
