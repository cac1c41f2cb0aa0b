"""The summary of a merge names the next step to llama.cpp, where its conversion takes the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import factories
import pytest
import torch
from cli_runner import CliRunner

from loratools.cli import verbs

FIXTURES = Path(__file__).parents[2] / "fixtures"
Q = "model.layers.0.self_attn.q_proj"


def merged(base: Path, adapter: Path, out: Path, *options: str) -> str:
    """The summary, in one line."""
    result = CliRunner().invoke(verbs, ["merge", str(base), str(adapter), "-o", str(out), *options])
    assert result.exit_code == 0, result.output
    assert "convert_hf_to_gguf" not in result.stdout
    return " ".join(result.stderr.split())


def llama(folder: Path, *, config: dict[str, object] | None = None, quantised: bool = False) -> Path:
    """A Llama of the factory with the tokenizer of the fixture; q_proj of layer 0 in int8 where it is quantised."""
    weights = factories.base_weights(dtype=torch.bfloat16)
    if quantised:
        weights |= {
            f"{Q}.weight": torch.randint(-127, 128, (10, 6), dtype=torch.int8),
            f"{Q}.SCB": torch.rand(10) + 0.5,
            f"{Q}.weight_format": torch.tensor(0, dtype=torch.uint8),
        }
    factories.checkpoint_folder(folder, weights=weights, config={"model_type": "llama", **(config or {})})
    shutil.copy(FIXTURES / "llama-tiny" / "tokenizer.json", folder)
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return factories.adapter_folder(tmp_path / "a", modules={Q: (10, 6)})


def test_a_model_that_llama_cpp_converts_gets_the_command_with_its_paths_quoted(tmp_path: Path, adapter: Path) -> None:
    out = tmp_path / "my model"

    summary = merged(llama(tmp_path / "base"), adapter, out)

    # A long path is broken where it does not fit the width.
    assert "next for llama.cpp: convert_hf_to_gguf.py" in summary
    command = summary.partition("convert_hf_to_gguf.py")[2].replace(" ", "")
    assert command == f"'{out}'--outfile'{out}.gguf'".replace(" ", "")


@pytest.mark.parametrize("model_type", ["bert", "unknown"])
def test_a_model_that_it_does_not_know_gets_none(tmp_path: Path, adapter: Path, model_type: str) -> None:
    base = llama(tmp_path / "base", config={"model_type": model_type})

    assert "llama.cpp" not in merged(base, adapter, tmp_path / "out")


def test_a_model_without_a_tokenizer_gets_none(tmp_path: Path, adapter: Path) -> None:
    base = llama(tmp_path / "base")
    (base / "tokenizer.json").unlink()

    assert "llama.cpp" not in merged(base, adapter, tmp_path / "out")


def test_one_file_gets_none(tmp_path: Path, adapter: Path) -> None:
    base = llama(tmp_path / "base") / "model.safetensors"

    assert "llama.cpp" not in merged(base, adapter, tmp_path / "merged.safetensors")


@pytest.mark.parametrize(("option", "named"), [("--dequantize", True), ("--requantize", False)])
def test_quantised_weights_get_none_and_floats_of_them_do(
    tmp_path: Path, adapter: Path, option: str, named: bool
) -> None:
    section = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    base = llama(tmp_path / "base", config={"quantization_config": section}, quantised=True)

    assert ("llama.cpp" in merged(base, adapter, tmp_path / "out", option)) == named


@pytest.mark.parametrize("option", ["--quiet", "--json"])
def test_it_is_a_line_for_people_alone(tmp_path: Path, adapter: Path, option: str) -> None:
    base = llama(tmp_path / "base")

    result = CliRunner().invoke(verbs, ["merge", str(base), str(adapter), "-o", str(tmp_path / "out"), option])

    assert result.exit_code == 0
    assert "llama.cpp" not in result.output
    if option == "--json":
        json.loads(result.stdout)
