"""An empty text is no path in any function, as it is none on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import factories
import pytest

import loratools
from loratools.errors import UsageError

CALLS: dict[str, Callable[[Path, Path], object]] = {
    "merge out": lambda base, a: loratools.merge(base, a, ""),
    "merge base": lambda base, a: loratools.merge("", a, "out"),
    "merge adapter": lambda base, a: loratools.merge(base, "", "out"),
    "merge adapter with weight": lambda base, a: loratools.merge(base, [("", 0.5)], "out"),
    "extract out": lambda base, a: loratools.extract(base, base, "", rank=1),
    "combine out": lambda base, a: loratools.combine([a, a], ""),
    "combine adapter": lambda base, a: loratools.combine([a, ""], "out"),
    "combine residual": lambda base, a: loratools.combine([a, a], "out", rank=1, residual=""),
    "resize out": lambda base, a: loratools.resize(a, "", rank=1),
    "convert out": lambda base, a: loratools.convert(a, "", format="mlx"),
    "save out": lambda base, a: loratools.save(a, ""),
    "load": lambda base, a: loratools.load(""),
    "inspect": lambda base, a: loratools.inspect(a, ""),
    "open_checkpoint": lambda base, a: loratools.open_checkpoint(""),
}


@pytest.mark.parametrize("call", CALLS)
def test_empty_path_is_refused_and_nothing_written(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = factories.checkpoint_folder(tmp_path / "base"), factories.adapter_folder(tmp_path / "style")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    with pytest.raises(UsageError, match="is empty"):
        CALLS[call](base, adapter)

    assert list(here.iterdir()) == []
