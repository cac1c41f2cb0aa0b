"""How a page came to be: the command, the date, and the versions of the programs."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from loratools._version import __version__

# User name and password in an address: a page is passed on.
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")


@dataclass(frozen=True)
class About:
    """How a page came to be.

    Attributes:
        command: The command line; None if a program called the library.
        date: The day, as 2026-11-28.
        version: The version of loratools.
        programs: Names and versions of the programs that took part.
    """

    command: str | None
    date: str
    version: str
    programs: tuple[str, ...]


def about(arguments: Sequence[str] | None = None) -> About:
    """Return what there is to say of this process.

    The date is that of `SOURCE_DATE_EPOCH`, where the environment has it, so that a page can be made again. torch and
    numpy are named where they were used.

    Args:
        arguments: The arguments of the command line, without the name of the program.
    """
    command = None if arguments is None else shlex.join(["loratools", *arguments])
    programs = [f"loratools {__version__}", f"Python {platform.python_version()}"]
    programs += [
        f"{name} {version}"
        for name in ("torch", "numpy")
        if (version := getattr(sys.modules.get(name), "__version__", None)) is not None
    ]
    return About(
        command=_CREDENTIALS.sub("…", command) if command is not None else None,
        date=_date(),
        version=__version__,
        programs=tuple(programs),
    )


def _date() -> str:
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    moment = time.gmtime(int(epoch)) if epoch.isdecimal() else time.localtime()
    return time.strftime("%Y-%m-%d", moment)
