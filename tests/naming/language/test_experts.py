"""Experts by one name, stored under another: what a merge writes, with the rows and columns written out here."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from checkpoints.merging import assert_added, save_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools
from loratools.naming.language.aliases import aliases
from loratools.naming.places import Part, Place
from loratools.tensors.views import Span

EXPERTS, INNER, WIDTH = 3, 5, 8
PARENT = "model.layers.0.mlp.experts"
SHAPES = {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}


def fused(gate_up: tuple[int, int], down: tuple[int, int]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    return {
        f"{PARENT}.gate_up_proj": torch.randn(EXPERTS, *gate_up, generator=g),
        f"{PARENT}.down_proj": torch.randn(EXPERTS, *down, generator=g),
    }


def merged(stored: dict[str, Tensor], config: dict[str, object], tmp_path: Path) -> tuple[dict[str, Tensor], ...]:
    """The result of merging an adapter of the experts 0 and 2, named one by one, and its deltas."""
    (tmp_path / "base").mkdir()
    save_file(stored, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    shapes = {f"{PARENT}.{i}.{role}": shape for i in (0, 2) for role, shape in SHAPES.items()}
    deltas = save_adapter(tmp_path / "adapter", shapes)
    loratools.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    return load_file(tmp_path / "out" / "model.safetensors"), deltas


def test_experts_of_an_adapter_go_into_fused_ones_of_gpt_oss_in_turn_and_transposed(tmp_path: Path) -> None:
    stored = fused((WIDTH, 2 * INNER), (INNER, WIDTH))

    after, deltas = merged(stored, {"model_type": "gpt_oss"}, tmp_path)

    for i in (0, 2):
        both = torch.stack([deltas[f"{PARENT}.{i}.gate_proj"], deltas[f"{PARENT}.{i}.up_proj"]], dim=1)
        assert_added(
            after[f"{PARENT}.gate_up_proj"][i], stored[f"{PARENT}.gate_up_proj"][i], both.reshape(2 * INNER, WIDTH).T
        )
        assert_added(after[f"{PARENT}.down_proj"][i], stored[f"{PARENT}.down_proj"][i],
                     deltas[f"{PARENT}.{i}.down_proj"].T)  # fmt: skip
    assert all(torch.equal(after[name][1], stored[name][1]) for name in stored)


def test_experts_of_an_adapter_go_into_fused_ones_one_half_after_the_other(tmp_path: Path) -> None:
    stored = fused((2 * INNER, WIDTH), (WIDTH, INNER))

    after, deltas = merged(stored, {"model_type": "qwen3_moe"}, tmp_path)

    for i in (0, 2):
        both = torch.cat([deltas[f"{PARENT}.{i}.gate_proj"], deltas[f"{PARENT}.{i}.up_proj"]])
        assert_added(after[f"{PARENT}.gate_up_proj"][i], stored[f"{PARENT}.gate_up_proj"][i], both)
        assert_added(after[f"{PARENT}.down_proj"][i], stored[f"{PARENT}.down_proj"][i],
                     deltas[f"{PARENT}.{i}.down_proj"])  # fmt: skip
    assert all(torch.equal(after[name][1], stored[name][1]) for name in stored)


def test_first_files_of_qwen3_vl_moe_have_fused_experts_the_other_way_round() -> None:
    config = {"model_type": "qwen3_vl_moe", "text_config": {"hidden_size": WIDTH}}
    first = {name: tuple(t.shape) for name, t in fused((WIDTH, 2 * INNER), (INNER, WIDTH)).items()}
    saved = {name: tuple(t.shape) for name, t in fused((2 * INNER, WIDTH), (WIDTH, INNER)).items()}

    known = aliases(config, first)

    assert known[f"{PARENT}.gate_up_proj"].shape == (EXPERTS, 2 * INNER, WIDTH)
    assert known[f"{PARENT}.gate_up_proj"].places == (Place(f"{PARENT}.gate_up_proj", transposed=True),)
    assert known[f"{PARENT}.down_proj"].places == (Place(f"{PARENT}.down_proj", transposed=True),)
    assert known[f"{PARENT}.1.up_proj.weight"].places == (
        Place(f"{PARENT}.gate_up_proj", True, Part(1, columns=Span(INNER, 2 * INNER))),
    )
    assert f"{PARENT}.gate_up_proj" not in aliases(config, saved)


def test_experts_that_are_not_all_there_are_not_fused() -> None:
    names = [f"{PARENT}.{i}.{role}.weight" for i in (0, 2) for role in SHAPES]

    known = aliases({"model_type": "qwen3_moe"}, {name: SHAPES[name.split(".")[-2]] for name in names})

    assert known == {}


def test_single_experts_of_gpt_oss_in_4_bits_go_into_the_fused_ones_as_they_are(tmp_path: Path) -> None:
    """Unsloth cuts `gate_up_proj` into one layer for each expert, whose rows stand in turn as in the parameter."""
    stored = {name: values.double() for name, values in fused((WIDTH, 2 * INNER), (INNER, WIDTH)).items()}
    (tmp_path / "base").mkdir()
    save_file(stored, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    shapes = {f"{PARENT}.gate_up_projs.{i}": (2 * INNER, WIDTH) for i in (0, 2)}
    shapes |= {f"{PARENT}.down_projs.{i}": (WIDTH, INNER) for i in (0, 2)}
    deltas = save_adapter(tmp_path / "adapter", shapes)

    loratools.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")

    after = load_file(tmp_path / "out" / "model.safetensors")
    for leaf in ("gate_up_proj", "down_proj"):
        for i in (0, 2):
            assert_added(after[f"{PARENT}.{leaf}"][i], stored[f"{PARENT}.{leaf}"][i], deltas[f"{PARENT}.{leaf}s.{i}"].T)
        assert torch.equal(after[f"{PARENT}.{leaf}"][1], stored[f"{PARENT}.{leaf}"][1])


def test_no_other_model_has_such_experts() -> None:
    shapes = {f"{PARENT}.gate_up_proj": (EXPERTS, 2 * INNER, WIDTH), f"{PARENT}.down_proj": (EXPERTS, WIDTH, INNER)}

    assert not [name for name in aliases({"model_type": "qwen3_moe"}, shapes) if "projs" in name]
