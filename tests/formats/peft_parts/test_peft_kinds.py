"""Adapters of PEFT's other kinds that are damaged or hostile are refused by name, nothing passed over."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import factories
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratools import formats, merge
from loratools.errors import InputError
from loratools.ops.merge import plan as merge_plan
from loratools.ops.merge.verb import plan_from_headers

LOHA = {"hada_w1_a": (10, 2), "hada_w1_b": (2, 6), "hada_w2_a": (10, 2), "hada_w2_b": (2, 6)}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def saved(folder: Path, peft_type: str, parts: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    save_file({f"base_model.model.{name}": t for name, t in parts.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type, **(config or {})}))
    return folder


REFUSED: dict[str, tuple[str, dict[str, Tensor], dict[str, Any], str]] = {
    "empty parts": (
        "LOHA",
        {f"a.{name}": random(*(0 if size == 2 else size for size in shape)) for name, shape in LOHA.items()},
        {},
        "4 tensors that cannot be",
    ),
    "no blocks": (
        "GRALORA",
        {"a.gralora_A": random(0, 3, 2), "a.gralora_B": random(0, 2, 5)},
        {"alpha": 4},
        "2 tensors",
    ),
    "a part without axes": (
        "LOHA",
        {f"a.{name}": torch.tensor(1.0) if name == "hada_w1_b" else random(*s) for name, s in LOHA.items()},
        {},
        r"a.hada_w1_b' has shape \[\]",
    ),
    "integers": (
        "LOHA",
        {f"a.{name}": random(*shape).int() for name, shape in LOHA.items()},
        {},
        "has dtype I32; a floating-point tensor is needed",
    ),
    "factors of LoRA beside another kind": (
        "HRA",
        {"a.hra_u": random(6, 2), "b.lora_A.weight": random(2, 6), "b.lora_B.weight": random(5, 2)},
        {},
        "b.lora_A.weight' and 1 more: LoRA",
    ),
    "a part stored twice": (
        "HRA",
        {"a.hra_u": random(6, 2), "a.hra_u.default": random(6, 2) + 1},
        {},
        "1 part of modules stored more than once",
    ),
    "no regular expression": ("IA3", {"a.ia3_l": random(1, 6, 1, 1)}, {"feedforward_modules": "("}, "is no regular"),
    "a regular expression of years": (
        "IA3",
        {f"{'a' * 40}.ia3_l": random(1, 6, 1, 1)},
        {"feedforward_modules": "(a*)*b"},
        "takes more than",
    ),
    "a seed that no generator takes": (
        "FOURIERFT",
        {"a.fourierft_spectrum": random(4)},
        {"scaling": 2.0, "random_loc_seed": 10**20 - 1},
        "no whole number of 64 bits",
    ),
    "a series without end": (
        "OFT",
        {"a.oft_R": random(2, 3)},
        {"num_cayley_neumann_terms": 10**9},
        "at most 10000 terms",
    ),
    "modules of BD-LoRA that are none": (
        "LORA",
        {"a.lora_A.weight": random(2, 3), "a.lora_B.weight": random(10, 2)},
        {"use_bdlora": {"target_modules_bd_a": 5}},
        "no list of names",
    ),
    "a setting of BD-LoRA of tomorrow": (
        "LORA",
        {"a.lora_A.weight": random(2, 3), "a.lora_B.weight": random(10, 2)},
        {"use_bdlora": {"target_modules_bd_a": ["a"], "tomorrow": 3}},
        "settings that are not known here: tomorrow",
    ),
    "true for a number of blocks": (
        "LORA",
        {"a.lora_A.weight": random(2, 6), "a.lora_B.weight": random(10, 2)},
        {"use_bdlora": {"target_modules_bd_a": ["a"], "nblocks": True}},
        "of True blocks",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused_by_name(tmp_path: Path, case: str) -> None:
    peft_type, parts, config, message = REFUSED[case]

    with pytest.raises(InputError) as caught:
        formats.load(saved(tmp_path / "adapter", peft_type, parts, config))

    assert re.search(message, str(caught.value))


def test_a_reflection_by_a_vector_of_length_zero_gives_no_numbers(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base", weights={"a.weight": random(10, 6)})

    with pytest.raises(InputError, match=r"'a\.weight' would hold values that are not numbers"):
        merge(base, [saved(tmp_path / "adapter", "HRA", {"a.hra_u": torch.zeros(6, 2)})], tmp_path / "out")


DRAWN = {"scaling": 2.0, "random_loc_seed": 3}
WHOLE: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "FOURIERFT": ({"a.fourierft_spectrum": random(5)}, DRAWN),
    "WAVEFT": ({"a.waveft_spectrum": random(5)}, DRAWN),
    "C3A": ({"a.c3a_kernel": random(24, 20, 20)}, {"block_size": 20}),
}


@pytest.mark.parametrize("peft_type", WHOLE)
def test_a_delta_that_is_made_whole_is_made_once_and_counted_in_the_plan(
    tmp_path: Path, peft_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, config = WHOLE[peft_type]
    base = factories.checkpoint_folder(tmp_path / "base", weights={"a.weight": random(480, 400)})
    monkeypatch.setattr(merge_plan, "_UNIT_BYTES", 1 << 16)

    made = plan_from_headers(base, [saved(tmp_path / "adapter", peft_type, parts, config)], tmp_path / "out")

    assert [(unit.start, unit.stop) for unit in merge_plan.work_units(made)] == [(0, 480)]
    # Base, delta and result, and what they are made with, in float64.
    assert made.memory >= merge_plan._PROCESS_BYTES + merge_plan._BLOCKS_BYTES + 4 * 8 * 480 * 400


@pytest.mark.parametrize("ranges", [[[0, 10**13]], [[0, 50_000], [0, 60_000]]])
def test_more_layers_than_any_model_has_are_refused_before_they_are_listed(tmp_path: Path, ranges: object) -> None:
    base = factories.checkpoint_folder(tmp_path / "base")
    adapter = factories.adapter_folder(tmp_path / "adapter", config={"layer_replication": ranges})

    with pytest.raises(InputError, match="which names no layers"):
        merge(base, [adapter], tmp_path / "out")
