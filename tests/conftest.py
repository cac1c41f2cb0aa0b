"""Skips tests whose peers are not installed, and says at the end of a run how many there are."""

from __future__ import annotations

from collections.abc import Generator

import peers
import pytest


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
