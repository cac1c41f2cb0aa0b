from __future__ import annotations

import json
from pathlib import Path

import peers
import pytest
import torch
from checkpoints.merging import assert_added, save_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools
from loratools.checkpoints import open_checkpoint
from loratools.errors import UnsupportedError

EXPERTS, INNER, WIDTH = 3, 10, 6
STACK = "model.layers.0.block_sparse_moe.switch_mlp"


def weights() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    return {
        "model.layers.0.self_attn.q_proj.weight": torch.randn(8, WIDTH, generator=g),
        f"{STACK}.gate_proj.weight": torch.randn(EXPERTS, INNER, WIDTH, generator=g),
        f"{STACK}.up_proj.weight": torch.randn(EXPERTS, INNER, WIDTH, generator=g),
        f"{STACK}.down_proj.weight": torch.randn(EXPERTS, WIDTH, INNER, generator=g),
        "visual.patch.weight": torch.randn(7, 2, 2, 3, generator=g),
    }


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    save_file(weights(), tmp_path / "base" / "model.safetensors", {"format": "mlx"})
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    return tmp_path / "base"


def test_a_folder_that_mlx_saved_is_known_by_what_its_files_say(base: Path) -> None:
    assert open_checkpoint(base).layout == "mlx"
    assert open_checkpoint(base / "model.safetensors").layout == "mlx"


def test_the_result_is_a_folder_of_mlx_again(base: Path, tmp_path: Path) -> None:
    deltas = save_adapter(tmp_path / "adapter", {"model.layers.0.self_attn.q_proj": (8, WIDTH)})

    loratools.merge(base, [tmp_path / "adapter"], tmp_path / "out")

    merged = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    assert_added(merged[f"{name}.weight"], weights()[f"{name}.weight"], deltas[name])
    assert open_checkpoint(tmp_path / "out").layout == "mlx"


def test_experts_of_an_adapter_for_transformers_go_into_the_stack(base: Path, tmp_path: Path) -> None:
    roles = {
        "w1": ("gate_proj", (INNER, WIDTH)),
        "w3": ("up_proj", (INNER, WIDTH)),
        "w2": ("down_proj", (WIDTH, INNER)),
    }
    parent = "model.layers.0.block_sparse_moe.experts"
    deltas = save_adapter(
        tmp_path / "adapter", {f"{parent}.{i}.{w}": shape for i in (0, 2) for w, (_, shape) in roles.items()}
    )

    loratools.merge(base, [tmp_path / "adapter"], tmp_path / "out")

    merged = load_file(tmp_path / "out" / "model.safetensors")
    for w, (role, _) in roles.items():
        name = f"{STACK}.{role}.weight"
        for i in (0, 2):
            assert_added(merged[name][i], weights()[name][i], deltas[f"{parent}.{i}.{w}"])
        assert torch.equal(merged[name][1], weights()[name][1])


def test_kernels_with_their_channels_last_are_refused_by_name(base: Path, tmp_path: Path) -> None:
    # (out, in, kernel) of PyTorch, which happens to have the shape that MLX stores: nothing tells the two apart.
    g = torch.Generator().manual_seed(1)
    (tmp_path / "adapter").mkdir()
    prefix = "base_model.model.visual.patch"
    parts = {f"{prefix}.lora_A.weight": torch.randn(2, 2, 2, 3, generator=g)}
    parts[f"{prefix}.lora_B.weight"] = torch.randn(7, 2, 1, 1, generator=g)
    save_file(parts, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["patch"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))

    with pytest.raises(UnsupportedError) as caught:
        loratools.merge(base, [tmp_path / "adapter"], tmp_path / "out")

    assert caught.value.details[0].startswith("visual.patch.weight   MLX keeps the channels of a kernel last")
    assert not (tmp_path / "out").exists()


@peers.needs("mlx", "mlx_lm")
def test_mlx_lm_stacks_experts_as_is_read_here(tmp_path: Path) -> None:
    import mlx.core as mx
    import mlx_lm.models.mixtral as mixtral

    args = mixtral.ModelArgs(
        model_type="mixtral", vocab_size=11, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=EXPERTS, num_experts_per_tok=2,
    )  # fmt: skip
    parent = "model.layers.0.block_sparse_moe"
    single = {
        f"{parent}.experts.{i}.{w}.weight": mx.full((WIDTH, INNER) if w == "w2" else (INNER, WIDTH), 10.0 * i + j)
        for i in range(EXPERTS)
        for j, w in enumerate(("w1", "w2", "w3"))
    }

    stacked = mixtral.Model(args).sanitize(dict(single))

    from loratools.naming.language.aliases import aliases

    known = aliases({"model_type": "mixtral"}, {name: tuple(value.shape) for name, value in stacked.items()})
    for name, value in single.items():
        (place,) = known[name].places
        assert mx.array_equal(stacked[place.weight][place.at.expert], value)
