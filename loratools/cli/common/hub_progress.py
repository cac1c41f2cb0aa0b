"""What is printed about sources on the hub: the revision of each address, and the downloads.

On a terminal a download is a bar, in the bars of the verb where it draws some; elsewhere it is a line. In a worker of
the command nothing is printed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

from loratools.cli.common.grouped_help import INPUT, option
from loratools.cli.common.output import Output, print_line
from loratools.report.text import safe, size

_Command = TypeVar("_Command", bound=Callable[..., Any])

# Configs and the like are there at once.
_WORTH_A_LINE = 100_000
_OFFLINE = option(
    INPUT,
    "--offline",
    is_flag=True,
    help="Ask nothing of the Hugging Face hub: of addresses there, use what is in its cache on this machine.",
)


class OnStderr:
    """Prints on stderr what is fetched, for one command."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._process = os.getpid()

    def pinned(self, address: str, commit: str, note: str | None) -> None:
        """Print which commit an address means."""
        if not self._output.quiet:
            print_line(sys.stderr, safe(f"{address} is commit {commit}" + (f", {note}" if note else "")))

    @contextmanager
    def downloading(self, name: str, nbytes: int) -> Iterator[Callable[[int], None]]:
        """Show one download."""
        if os.getpid() != self._process:
            yield lambda advance: None
            return
        with self._output.progress(nbytes, f"downloading {name.rpartition('/')[2]}") as bar:
            if bar is None and not self._output.quiet and nbytes >= _WORTH_A_LINE:
                print_line(sys.stderr, safe(f"downloading {name} ({size(nbytes)})"))
            yield bar if bar is not None else lambda advance: None


def sources(command: _Command) -> Callable[..., Any]:
    """Add --offline, of a verb with sources, and what is printed while they are fetched. Stands below `common`."""

    @wraps(command)
    def run(*args: Any, offline: bool, output: Output, **settings: Any) -> Any:
        from loratools.sources import listener

        tokens = listener.listener.set(OnStderr(output)), listener.offline.set(offline)
        try:
            return command(*args, output=output, **settings)
        finally:
            listener.listener.reset(tokens[0])
            listener.offline.reset(tokens[1])

    return _OFFLINE(run)
