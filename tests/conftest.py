"""Skips tests whose peers are not installed, and says at the end of a run how many there are.

The tests also run on a Python for which there is no torch: files and tests that import torch, or what needs it, are
skipped there. A test during which loratools itself asks for torch fails.
"""

from __future__ import annotations

import importlib.abc
import os
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import peers
import pytest
from hypothesis import HealthCheck, settings

# On a machine with other work everything is slow, and that is no fault of a test.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "loratools"


class SkipWithoutTorch(importlib.abc.MetaPathFinder):
    """Asked for modules that no other finder has: an import of torch by a file of the tests skips."""

    packages = ("torch", "peft", "transformers", "scipy")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        frame = sys._getframe() if name in self.packages else None
        while frame is not None:
            parents = Path(frame.f_code.co_filename).parents
            if PACKAGE in parents:
                return
            if TESTS in parents and Path(frame.f_code.co_filename) != Path(__file__):
                pytest.skip(f"{name} is not installed", allow_module_level=True)
            frame = frame.f_back


# A shell without job control starts `pytest &` with SIGINT ignored, and nohup with SIGHUP; the programs that tests
# start would inherit it, and those that are interrupted on purpose would not stop.
for name in ("SIGINT", "SIGHUP"):
    number = getattr(signal, name, None)
    if number is not None and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)

# A person may have it exported, and pytest-xdist sets it; a test chooses the width of what is printed itself.
os.environ.pop("COLUMNS", None)

# `owner/name` is a repository of the hub where there is no such path: tests ask a stand-in of their own, or nothing.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if not peers.is_installed("torch"):
    sys.meta_path.append(SkipWithoutTorch())


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("oracle"):
        for name in mark.args:
            if not peers.is_installed(name):
                pytest.skip(peers.reason(name))


@pytest.hookimpl(wrapper=True, tryfirst=True)  # written after all other summaries
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None, None, None]:
    """`12 tests wait for `make oracles`: 9 for diffusers, 3 for gguf`, if any do."""
    yield
    waiting: dict[str, int] = {}
    for report in terminalreporter.getreports("skipped"):
        message = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if message.endswith(peers.REMEDY):
            name = message.removeprefix("Skipped: ").partition(" ")[0].partition(".")[0]
            waiting[name] = waiting.get(name, 0) + 1
    if waiting:
        count = sum(waiting.values())
        tests = "1 test waits" if count == 1 else f"{count} tests wait"
        peer_counts = ", ".join(f"{number} for {name}" for name, number in sorted(waiting.items()))
        terminalreporter.write_line(f"{tests} for `make oracles`: {peer_counts}", yellow=True)
