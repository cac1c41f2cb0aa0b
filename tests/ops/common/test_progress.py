"""The total that a bar is told is what it is then called with, in every verb that reads adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import factories
import pytest

import loratools


class Bar:
    def __init__(self) -> None:
        self.total: int | None = None
        self.done = 0

    def expect(self, total: int) -> None:
        assert self.done == 0, "the total comes before the first bytes"
        self.total = total

    def __call__(self, done: int, /) -> None:
        self.done += done


VERBS: dict[str, Callable[[Path, Bar], object]] = {
    "inspect": lambda at, bar: loratools.inspect(at / "a", at / "base", values=True, progress=bar),
    "compare": lambda at, bar: loratools.compare(at / "a", at / "b", progress=bar),
    "resize": lambda at, bar: loratools.resize(at / "a", rank=1, progress=bar),
    "combine": lambda at, bar: loratools.combine([at / "a", at / "b"], progress=bar),
    "combine to a rank": lambda at, bar: loratools.combine([at / "a", at / "b"], method="ties", rank=2, progress=bar),
}


@pytest.mark.parametrize("verb", VERBS)
def test_total_of_the_headers_is_what_is_read(verb: str, tmp_path: Path) -> None:
    factories.adapter_folder(tmp_path / "a", rank=3)
    factories.adapter_folder(tmp_path / "b", rank=2, seed=5)
    factories.checkpoint_folder(tmp_path / "base")
    bar = Bar()

    VERBS[verb](tmp_path, bar)

    assert bar.total
    assert bar.done == bar.total


def test_plain_function_is_not_told(tmp_path: Path) -> None:
    factories.adapter_folder(tmp_path / "a")
    read: list[int] = []

    loratools.resize(tmp_path / "a", rank=1, progress=read.append)

    assert sum(read) > 0
