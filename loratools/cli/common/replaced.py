"""What `--plan` says of an output that is there already: files that `--overwrite` replaces, and what stays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import RenderableType

    from loratools.storage.commit import Replacement

_SHOWN = 10


class WritingReport(Protocol):
    """The report of a verb that writes an adapter."""

    def to_dict(self) -> dict[str, object]: ...


def document_of(report: WritingReport, out: Path | None, *, overwrite: bool, plan: bool) -> dict[str, object]:
    """The document of a report; of a plan also what it would replace."""
    document = report.to_dict()
    return with_replaced(document, out, overwrite=overwrite) if plan else document


def with_replaced(document: Mapping[str, object], out: Path | None, *, overwrite: bool) -> dict[str, object]:
    """The document of a plan with `replaces` and `keeps`: names in the output, which is otherwise empty or new."""
    replacement = _replacement(out, overwrite)
    return {**document, "replaces": list(replacement.files), "keeps": list(replacement.preserved)}


def replaced_rows(out: Path | None, *, overwrite: bool) -> list[RenderableType]:
    """The same for people; nothing where there is nothing in the way."""
    from loratools.report.pairs import pairs

    replacement = _replacement(out, overwrite)
    rows = [("replaces", _listed(replacement.files)), ("keeps", _listed(replacement.preserved))]
    rows = [row for row in rows if row[1]]
    return [pairs(rows)] if rows else []


def _replacement(out: Path | None, overwrite: bool) -> Replacement:
    from loratools.storage.commit import Replacement, check_output

    return check_output(out, overwrite=overwrite, inputs=()) if out is not None else Replacement()


def _listed(names: tuple[str, ...]) -> str:
    more = f", … and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
