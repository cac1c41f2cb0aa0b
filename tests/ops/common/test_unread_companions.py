"""Files of tensors beside an adapter that are not read: every verb names them, and merge refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import factories
import pytest
import torch
from safetensors.torch import save_file

import loratools
from loratools.errors import LoraToolsError

OUT = "out"


def warnings_of_entries(report: loratools.InspectReport) -> Iterable[str]:
    return [w for e in report.sources if isinstance(e, loratools.AdapterEntry) for w in e.warnings]


VERBS: dict[str, Callable[[Path, Path], Iterable[str]]] = {
    "inspect": lambda a, at: warnings_of_entries(loratools.inspect(a)),
    "compare": lambda a, at: loratools.compare(a, at / "other").warnings,
    "compare the other way": lambda a, at: loratools.compare(at / "other", a).warnings,
    "resize": lambda a, at: loratools.resize(a, at / OUT, rank=1).warnings,
    "combine": lambda a, at: loratools.combine([a, at / "other"], at / OUT).warnings,
    "convert": lambda a, at: loratools.convert(a, at / OUT, format="mlx").warnings,
    "spectrum": lambda a, at: loratools.spectrum(a).warnings,
    "merge": lambda a, at: loratools.merge(at / "base", a, at / OUT, allow_partial=True).warnings,
    "merge --plan": lambda a, at: loratools.merge(at / "base", a, at / OUT, allow_partial=True, plan=True).warnings,
}


@pytest.fixture
def style(tmp_path: Path) -> Path:
    factories.checkpoint_folder(tmp_path / "base")
    factories.adapter_folder(tmp_path / "other", seed=3)
    folder = factories.adapter_folder(tmp_path / "style")
    save_file({"projector.weight": torch.ones(3)}, folder / "projector.safetensors")
    return folder


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_names_the_file(verb: str, style: Path, tmp_path: Path) -> None:
    warnings = list(VERBS[verb](style, tmp_path))

    assert [w for w in warnings if "'projector.safetensors' beside the adapter holds tensors that are not read" in w]


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_names_a_file_that_is_not_there(verb: str, style: Path, tmp_path: Path) -> None:
    (style / "projector.safetensors").unlink()

    assert not [w for w in VERBS[verb](style, tmp_path) if "beside the adapter" in w]


def test_merge_refuses_it(style: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraToolsError, match="files beside it with tensors that are not read"):
        loratools.merge(tmp_path / "base", style, tmp_path / OUT)
    assert not (tmp_path / OUT).exists()
