"""No reader of a config takes a field, or the type of its value, for granted.

The configs of adapters come from strangers and from many versions of their libraries. Every field of the config of
every kind of PEFT, and of MLX, is left out in turn and given values of other types: the adapter is then read, or
refused with an error of ours, and never fails in another way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from updates import test_parity_loha_to_kasa as loha_to_kasa
from updates import test_parity_vera_to_supertuning as vera_to_supertuning

import loratools
from loratools.errors import LoraToolsError

ABSENT = object()
VALUES: tuple[object, ...] = (ABSENT, None, "text", [], [3], {}, {"a": "b"}, -1, 0, 1.5, 10**400, True)


def variations(config: dict[str, object]) -> Iterator[tuple[str, object, dict[str, object]]]:
    for field in config:
        for value in VALUES:
            others = {name: v for name, v in config.items() if name != field}
            yield field, value, others if value is ABSENT else {**others, field: value}


def failures(folder: Path) -> list[str]:
    """The variations of a folder's config that end in an error that is none of ours."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(loratools.load(folder), loratools.Adapter)
    failed = []
    for field, value, varied in variations(config):
        path.write_text(json.dumps(varied), encoding="utf-8")
        try:
            loratools.inspect(folder)
        except LoraToolsError:
            continue
        except Exception as error:
            shown = "absent" if value is ABSENT else repr(value)[:20]
            failed.append(f"{field} = {shown}: {type(error).__name__}: {error}"[:200])
    return failed


# One case of each kind: the fields are the kind's, whatever layer it is on.
ONE_OF_A = {kind: case for case, (kind, _, _) in reversed(loha_to_kasa.CASES.items())}
ONE_OF_B = {case.config: name for name, case in reversed(vera_to_supertuning.CASES.items())}


@pytest.mark.parametrize("case", ONE_OF_A.values())
def test_configs_of_peft_with_any_field_absent_or_of_another_type_are_read_or_refused(
    case: str, tmp_path: Path
) -> None:
    assert failures(loha_to_kasa.trained(tmp_path / "adapter", case)) == []


@pytest.mark.parametrize("case", ONE_OF_B.values())
def test_configs_of_further_kinds_with_any_field_absent_or_of_another_type_are_read_or_refused(
    case: str, tmp_path: Path
) -> None:
    layers = vera_to_supertuning.CASES[case].layers[0]
    assert failures(vera_to_supertuning.trained(vera_to_supertuning.CASES[case], layers, tmp_path / "adapter")) == []


MLX_PARAMETERS = {"keys": ["self_attn.q_proj"], "rank": 4, "alpha": 16.0, "scale": 10.0, "dropout": 0.0}
MLX = {
    "now": {"model": "m", "fine_tune_type": "lora", "num_layers": 2, "lora_parameters": MLX_PARAMETERS},
    "before 2025": {"model": "m", "train": True, "lora_layers": 2, "batch_size": 4, "lora_parameters": MLX_PARAMETERS},
    "dora": {"fine_tune_type": "dora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 10.0}},
    "full": {"fine_tune_type": "full", "num_layers": 2},
}


@pytest.mark.parametrize("name", MLX)
def test_configs_of_mlx_with_any_field_absent_or_of_another_type_are_read_or_refused(name: str, tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.q_proj"
    factors = {f"{module}.lora_a": torch.ones(6, 4), f"{module}.lora_b": torch.ones(4, 10)}
    tensors = {f"{module}.weight": torch.ones(10, 6)} if name == "full" else factors
    save_file(tensors, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(MLX[name]), encoding="utf-8")

    assert failures(tmp_path) == []


def test_folder_of_mlx_before_2025_has_the_scale_that_it_states(tmp_path: Path) -> None:
    module = "model.layers.{}.self_attn.{}"
    tensors = {}
    for i in range(2):
        for name in ("q_proj", "v_proj"):
            tensors[f"{module.format(i, name)}.lora_a"] = torch.ones(6, 4)
            tensors[f"{module.format(i, name)}.lora_b"] = torch.ones(4, 10)
    save_file(tensors, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(MLX["before 2025"]), encoding="utf-8")

    adapter = loratools.load(tmp_path)

    assert adapter.format == "mlx"
    assert [(u.rank, u.scale) for u in adapter.updates.values()] == [(4, 10.0)] * 4
