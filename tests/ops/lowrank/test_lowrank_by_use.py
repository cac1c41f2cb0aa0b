"""What people do with combine, resize and spectrum that their authors did not have in mind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import factories
import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools


def run(*arguments: object) -> str:
    """What the command prints on stdout; it must end in order."""
    command = [sys.executable, "-m", "loratools", *map(str, arguments)]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("verb", ["combine", "resize"])
def test_another_format_is_written_where_it_is_asked_for(tmp_path: Path, verb: str) -> None:
    adapter = factories.adapter_folder(tmp_path / "style")

    run(verb, adapter, "-o", tmp_path / "out", "--rank", 2, "--format", "mlx", "-q")

    assert loratools.load(tmp_path / "out").format == "mlx"
    assert {u.rank for u in loratools.load(tmp_path / "out").updates.values()} == {2}


def test_a_residual_is_not_written_over_the_combination(tmp_path: Path) -> None:
    one, two = (factories.adapter_folder(tmp_path / str(i), seed=i) for i in (1, 2))

    with pytest.raises(loratools.UsageError, match="over the combination"):
        loratools.combine([one, two], tmp_path / "out", rank=2, residual=tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_the_spectrum_of_an_untrained_adapter_says_that_there_is_nothing(tmp_path: Path) -> None:
    zero = {n: (torch.ones(4, i), torch.zeros(o, 4)) for n, (o, i) in factories.MODULES.items()}
    adapter = factories.adapter_folder(tmp_path / "zero", values=zero)

    told = json.loads(run("spectrum", adapter, "--json"))

    assert "every singular value is 0" in json.dumps(told)


def test_the_spectrum_of_what_depends_on_its_base_is_refused_by_name(tmp_path: Path) -> None:
    adapter = factories.adapter_folder(tmp_path / "dora", config={"use_dora": True})
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, (out, _) in factories.MODULES.items():
        tensors[f"base_model.model.{name}.lora_magnitude_vector"] = torch.ones(out)
    save_file(tensors, adapter / "adapter_model.safetensors")

    with pytest.raises(loratools.UnsupportedError) as raised:
        loratools.spectrum(adapter)

    assert any("q_proj" in line for line in raised.value.details)
