"""Write the parts of README.md and docs/ that say what the code says: tables of the registries, and help texts.

    python docs/generate.py          rewrite them
    python docs/generate.py --check  end with 1 where one is out of date

A part stands between `<!-- name -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from loratools import registry
from loratools.cli import verbs

ROOT = Path(__file__).parents[1]


def formats() -> str:
    rows = []
    for name in registry.names("formats"):
        entry = registry.load("formats", name)
        able = ["yes" if hasattr(entry, word) else "no" for word in ("read", "write")]
        rows.append(f"| `{name}` | {able[0]} | {able[1]} | {registry.summary('formats', name)} |")
    return "\n".join(["| format | read | write | what it is |", "|---|---|---|---|", *rows])


def _summaries(folder: str, word: str) -> str:
    rows = [f"| `{name}` | {registry.summary(folder, name)} |" for name in registry.names(folder)]
    return "\n".join([f"| {word} | what it is |", "|---|---|", *rows])


def layouts() -> str:
    return _summaries("checkpoints", "layout")


def methods() -> str:
    """Every method with what holds of it (`methods.Laws`) and what `--set` takes."""
    from loratools import methods as registered

    rows = []
    for name in registry.names("methods"):
        laws = registry.load("methods", name).LAWS
        marks = " | ".join("yes" if holds else "no" for holds in (laws.turns, laws.gauge, laws.order, laws.alone))
        options = "; ".join(f"`{o.name}={o.default}`: {o.about}" for o in registered.options_of(name)) or "–"
        rows.append(f"| `{name}` | {registry.summary('methods', name)} | {marks} | {options} |")
    head = "| method | what it is | turns | deltas only | any order | alone | `--set` |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *rows])


def kinds() -> str:
    return _summaries("updates", "kind")


def quantization() -> str:
    return _summaries("quantization", "scheme")


def helps() -> str:
    import click

    context = click.Context(verbs, info_name="loratools", max_content_width=100, terminal_width=100)
    parts = []
    for name in verbs.list_commands(context):
        command = verbs.get_command(context, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=context, max_content_width=100, terminal_width=100)
        parts.append(f"## loratools {name}\n\n```text\n{command.get_help(inner)}\n```")
    return "\n\n".join(parts)


PARTS: dict[str, Callable[[], str]] = {
    "formats": formats,
    "layouts": layouts,
    "methods": methods,
    "kinds": kinds,
    "quantization": quantization,
    "helps": helps,
}
FILES = (ROOT / "README.md", ROOT / "docs" / "cli.md", ROOT / "docs" / "registries.md")


def regenerated(text: str) -> str:
    """`text` with every part that it marks made anew."""

    def fresh(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{PARTS[match[1]]()}\n<!-- end -->"

    return re.sub(rf"<!-- ({'|'.join(PARTS)}) -->\n.*?<!-- end -->", fresh, text, flags=re.DOTALL)


def main() -> int:
    stale = []
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        if (new := regenerated(text)) != text:
            stale.append(file.name)
            if "--check" not in sys.argv:
                file.write_text(new, encoding="utf-8")
    print("out of date: " + ", ".join(stale) if stale else "up to date")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
