"""Work grows as the number of modules does: counted in calls of functions, not in time, which a busy machine bends."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch
from safetensors.torch import save_file

import loratools
from loratools import formats
from loratools.naming.image import evidence
from loratools.storage import safetensors_reader

FEW, MANY = 24, 96
OUT, IN, RANK = 5, 3, 2


def adapter(folder: Path, modules: int) -> Path:
    folder.mkdir(parents=True)
    tensors = {}
    for number in range(modules):
        # Sixteen modules a layer, as experts are.
        name = f"base_model.model.layers.{number // 16}.experts.{number % 16}.up_proj"
        generator = torch.Generator().manual_seed(number)
        tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, IN, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(OUT, RANK, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def plain_file(path: Path, tensors: int) -> Path:
    save_file({f"t{number:05d}": torch.zeros(1) for number in range(tensors)}, path)
    return path


def calls(work: Callable[[], object]) -> int:
    """How many functions, of Python and of C, are called in this thread, nothing being remembered of the same names."""
    formats._claims_of_names.clear()
    evidence._decided_once.cache_clear()
    count = 0

    def counted(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def quadratic(names: list[str]) -> int:
    return sum(name.startswith(other) for name in names for other in names)


def growth(few: Callable[[], object], many: Callable[[], object]) -> float:
    few()  # imports and caches
    return calls(many) / calls(few)


# Four times the modules: a little is the same for both, so linear work is below four, and quadratic work near sixteen.
LINEAR = 4.2


def test_the_measure_tells_quadratic_work_from_linear() -> None:
    few, many = ([str(number) for number in range(count)] for count in (FEW, MANY))

    assert growth(lambda: quadratic(few), lambda: quadratic(many)) > 12


@pytest.mark.parametrize(
    "verb",
    [
        pytest.param(lambda path, out: loratools.inspect(path), id="inspect"),
        pytest.param(lambda path, out: loratools.spectrum(path), id="spectrum"),
        pytest.param(lambda path, out: loratools.compare(path, path, threads=1), id="compare"),
        pytest.param(lambda path, out: loratools.resize(path, out, rank=1, overwrite=True), id="resize"),
        pytest.param(lambda path, out: loratools.combine([path, path], out, overwrite=True), id="combine"),
        pytest.param(lambda path, out: loratools.convert(path, out, format="peft", overwrite=True), id="convert"),
    ],
)
def test_a_verb_calls_as_many_functions_for_each_module_however_many_there_are(
    verb: Callable[[Path, Path], object], tmp_path: Path
) -> None:
    few, many = adapter(tmp_path / "few", FEW), adapter(tmp_path / "many", MANY)

    ratio = growth(lambda: verb(few, tmp_path / "out-few"), lambda: verb(many, tmp_path / "out-many"))

    assert ratio < LINEAR


def checkpoint(folder: Path, modules: int, change: float = 0.0) -> Path:
    """A base with the modules of `adapter`, each changed by a matrix of rank 1."""
    folder.mkdir(parents=True)
    weights = {}
    for number in range(modules):
        weight = torch.arange(float(OUT * IN)).reshape(OUT, IN) + change * torch.outer(
            torch.arange(5.0), torch.ones(IN)
        )
        weights[f"model.layers.{number // 16}.experts.{number % 16}.up_proj.weight"] = weight
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    return folder


@pytest.mark.parametrize(
    "verb",
    [
        pytest.param(
            lambda base, tuned, adapter, out: loratools.merge(base, adapter, out, threads=1, overwrite=True),
            id="merge",
        ),
        pytest.param(
            lambda base, tuned, adapter, out: loratools.verify(tuned, base, adapter, threads=1),
            id="verify",
        ),
        pytest.param(
            lambda base, tuned, adapter, out: loratools.extract(base, tuned, out, rank=1, threads=1, overwrite=True),
            id="extract",
        ),
        pytest.param(
            lambda base, tuned, adapter, out: loratools.spectrum(tuned, base=base, threads=1),
            id="spectrum of a fine-tune",
        ),
    ],
)
def test_a_verb_on_checkpoints_calls_as_many_functions_for_each_weight_however_many_there_are(
    verb: Callable[[Path, Path, Path, Path], object], tmp_path: Path
) -> None:
    def inputs(name: str, modules: int) -> tuple[Path, Path, Path, Path]:
        folder = tmp_path / name
        tuned = checkpoint(folder / "tuned", modules, 0.5)
        return checkpoint(folder / "base", modules), tuned, adapter(folder / "adapter", modules), folder / "out"

    few, many = inputs("few", FEW), inputs("many", MANY)

    assert growth(lambda: verb(*few), lambda: verb(*many)) < LINEAR


def test_a_file_that_is_no_adapter_is_inspected_with_as_many_calls_for_each_tensor(tmp_path: Path) -> None:
    few, many = (plain_file(tmp_path / f"{count}.safetensors", 10 * count) for count in (FEW, MANY))

    assert growth(lambda: loratools.inspect(few), lambda: loratools.inspect(many)) < LINEAR


def test_detection_parses_the_header_of_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    columns = safetensors_reader.header_columns
    monkeypatch.setattr(safetensors_reader, "header_columns", lambda header: parsed.append(header) or columns(header))

    loratools.inspect(plain_file(tmp_path / "some.safetensors", 7))

    assert len(parsed) == 1
