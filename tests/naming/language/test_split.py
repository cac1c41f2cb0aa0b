"""An adapter of a model with its projections apart, merged into one that has them in one weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints.merging import assert_added, save_adapter
from safetensors.torch import load_file, save_file

import loratools
from loratools.errors import MismatchError

WIDTH, HEADS, KEYS, HEAD, INNER = 12, 4, 2, 3, 7
LAYER = "model.layers.0"
QKV, GATE_UP = f"{LAYER}.self_attn.qkv_proj.weight", f"{LAYER}.mlp.gate_up_proj.weight"


def phi3(folder: Path, heads: int = HEADS) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(9)
    weights = {
        QKV: torch.randn((HEADS + 2 * KEYS) * HEAD, WIDTH, generator=g),
        GATE_UP: torch.randn(2 * INNER, WIDTH, generator=g),
    }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    config = {"model_type": "phi3", "hidden_size": WIDTH, "num_attention_heads": heads, "num_key_value_heads": KEYS}
    (folder / "config.json").write_text(json.dumps(config))
    return weights


def test_projections_apart_go_into_their_rows_of_the_fused_one(tmp_path: Path) -> None:
    before = phi3(tmp_path / "base")
    shapes = {
        f"{LAYER}.self_attn.k_proj": (KEYS * HEAD, WIDTH),
        f"{LAYER}.self_attn.v_proj": (KEYS * HEAD, WIDTH),
        f"{LAYER}.mlp.up_proj": (INNER, WIDTH),
    }
    key, value, up = save_adapter(tmp_path / "adapter", shapes).values()

    loratools.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")

    after = load_file(tmp_path / "out" / "model.safetensors")
    # 12 rows of queries, 6 of keys, 6 of values
    assert torch.equal(after[QKV][:12], before[QKV][:12])
    assert_added(after[QKV][12:18], before[QKV][12:18], key)
    assert_added(after[QKV][18:], before[QKV][18:], value)
    assert torch.equal(after[GATE_UP][:7], before[GATE_UP][:7])
    assert_added(after[GATE_UP][7:], before[GATE_UP][7:], up)


def test_without_heads_that_fit_nothing_is_guessed(tmp_path: Path) -> None:
    phi3(tmp_path / "base", heads=5)
    save_adapter(tmp_path / "adapter", {f"{LAYER}.self_attn.k_proj": (KEYS * HEAD, WIDTH)})

    with pytest.raises(MismatchError):
        loratools.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
