"""How the charts of one kind of report are built, and what a figure of them is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loratools.charts.values import Chart


def _untitled(report: object) -> str:
    return ""


@dataclass(frozen=True)
class Pictures:
    """The builder of a report's charts.

    Attributes:
        build: Returns the charts of a report, the one that says most first; none where there is nothing to draw.
        title: Returns the title of a figure of all of them; empty if each chart says enough.
    """

    build: Callable[[Any], tuple[Chart, ...]]
    title: Callable[[Any], str] = _untitled
