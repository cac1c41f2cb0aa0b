"""Commands of the command line, run inside the test's own process."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import click.testing


class CliRunner(click.testing.CliRunner):
    """click's runner with stderr apart from stdout and complete, which it is in click 8.1 only when asked for."""

    def __init__(self) -> None:
        options: dict[str, Any] = {}
        if "mix_stderr" in inspect.signature(click.testing.CliRunner).parameters:
            options["mix_stderr"] = False
        super().__init__(**options)

    @contextmanager
    def isolation(self, *args: Any, **options: Any) -> Generator[Any, None, None]:
        with super().isolation(*args, **options) as streams:
            sys.stderr.reconfigure(write_through=True)  # type: ignore[union-attr]
            yield streams
