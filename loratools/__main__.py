"""The program: `python -m loratools`, and the console script `loratools`.

Nothing is imported here that takes time: until the first line of `main` has run, Ctrl-C ends in Python's traceback.
"""

from __future__ import annotations

# `signal` itself imports `enum`, and so takes milliseconds in which nothing is caught.
import _signal  # type: ignore[import-not-found]
import os

# Read by type checkers as typing.TYPE_CHECKING.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    # Nothing has been begun, and no stream is open: there is nothing to clean up, and nothing to say.
    os._exit(128 + number)


def main() -> NoReturn:
    """Run the command line. Ctrl-C while it is still being imported ends it at once, without a traceback."""
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _leave)
    from loratools.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
