"""The page of `--html`: refused before the work where it may not be written, and written after it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from loratools.errors import UsageError


class PageFile(NamedTuple):
    """Where the report of a command goes as a page.

    Attributes:
        path: The file.
        overwrite: Whether a page that loratools wrote may be replaced.
        arguments: The arguments of the command line, which the page names.
    """

    path: Path
    overwrite: bool
    arguments: tuple[str, ...] = ()

    def check(self, out: Path | None) -> None:
        """Refuse what may not be written; the result of the command, and what lies in it, is nobody's page.

        Raises:
            UsageError: The page is the output or lies in it, or its name is not that of a page.
            OutputExistsError: It is there, and may not be replaced.
        """
        from loratools.pages.parts.writing import check_page

        real = Path(os.path.realpath(self.path))
        if out is not None and Path(os.path.realpath(out)) in (real, *real.parents):
            raise UsageError(
                f"the page '{self.path}' lies in the output '{out}', which has files of its own",
                hint="write the page beside it",
            )
        check_page(self.path, overwrite=self.overwrite)

    def write(self, report: object) -> None:
        """Write the page of the report."""
        from loratools.pages.parts.writing import write_page_of_command

        write_page_of_command(report, self.path, overwrite=self.overwrite, arguments=self.arguments)
