"""Merging into bases whose weights are quantised, or some of them: decided for each weight."""

from __future__ import annotations

import json
from pathlib import Path

import factories
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools import merge
from loratools.checkpoints import open_checkpoint
from loratools.errors import UnsupportedError

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def bits(values: Tensor) -> Tensor:
    return values.contiguous().reshape(-1).view(torch.uint8)


def mixed_base(folder: Path) -> dict[str, Tensor]:
    """A base with plain attention, experts in MXFP4, and one linear layer in float8 with a scale."""
    generator = torch.Generator().manual_seed(3)
    packed = {
        f"{EXPERTS}_blocks": torch.randint(0, 256, (2, 12, 1, 16), generator=generator, dtype=torch.uint8),
        f"{EXPERTS}_scales": torch.randint(110, 130, (2, 12, 1), generator=generator, dtype=torch.uint8),
        "model.layers.0.mlp.router.weight": torch.randn(9, 6, generator=generator).to(torch.float8_e4m3fn),
        "model.layers.0.mlp.router.weight_scale_inv": torch.full((1, 1), 0.5),
        "model.layers.0.mlp.router.input_scale": torch.tensor(3.0),
    }
    weights = factories.base_weights(dtype=torch.bfloat16) | packed
    factories.checkpoint_folder(
        folder, weights=weights, config={"quantization_config": {"quant_method": "mxfp4"}, "torch_dtype": "bfloat16"}
    )
    return packed


def one_module(folder: Path, module: str, shape: tuple[int, int]) -> Path:
    return factories.adapter_folder(folder, modules={module: shape})


def test_plain_weights_of_a_mixed_base_are_merged_and_packed_ones_keep_their_bytes(tmp_path: Path) -> None:
    packed = mixed_base(tmp_path / "base")
    before = load_file(tmp_path / "base" / "model.safetensors")
    adapter = one_module(tmp_path / "a", Q, (10, 6))

    report = merge(tmp_path / "base", [adapter], tmp_path / "out")

    after = load_file(tmp_path / "out" / "model.safetensors")
    assert report.merged_weights == 1
    assert list(after) == list(before)
    assert not torch.equal(after[f"{Q}.weight"], before[f"{Q}.weight"])
    for name in before.keys() - {f"{Q}.weight"}:
        assert torch.equal(bits(after[name]), bits(before[name]))
        assert (after[name].dtype, after[name].shape) == (before[name].dtype, before[name].shape)
    assert packed.keys() <= after.keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "mxfp4"}


def test_another_dtype_is_that_of_plain_weights_alone(tmp_path: Path) -> None:
    packed = mixed_base(tmp_path / "base")
    adapter = one_module(tmp_path / "a", Q, (10, 6))

    merge(tmp_path / "base", [adapter], tmp_path / "out", dtype="float32")

    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after[f"{V}.weight"].dtype == torch.float32
    assert all(torch.equal(bits(after[name]), bits(values)) for name, values in packed.items())


def test_packed_tensors_follow_into_files_that_are_cut_anew(tmp_path: Path) -> None:
    packed = mixed_base(tmp_path / "base")
    adapter = one_module(tmp_path / "a", Q, (10, 6))

    merge(tmp_path / "base", [adapter], tmp_path / "out", max_shard_size=400)

    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert packed.keys() <= index["weight_map"].keys()
    for name, values in packed.items():
        stored = load_file(tmp_path / "out" / index["weight_map"][name])[name]
        assert torch.equal(bits(stored), bits(values))


def test_a_quantised_target_is_refused_by_its_name_and_nothing_is_written(tmp_path: Path) -> None:
    mixed_base(tmp_path / "base")
    modules = {Q: (10, 6), "model.layers.0.mlp.router": (9, 6)}
    adapter = factories.adapter_folder(tmp_path / "a", modules=modules)

    with pytest.raises(UnsupportedError, match="1 weights that the adapters change are quantised") as caught:
        merge(tmp_path / "base", [adapter], tmp_path / "out")

    assert caught.value.exit_code == 4
    assert caught.value.details == ("model.layers.0.mlp.router.weight   fp8: fp8 e4m3, one scale",)
    assert "--exclude" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_a_quantised_target_that_is_excluded_is_no_reason_to_refuse(tmp_path: Path) -> None:
    mixed_base(tmp_path / "base")
    modules = {Q: (10, 6), "model.layers.0.mlp.router": (9, 6)}
    adapter = factories.adapter_folder(tmp_path / "a", modules=modules)

    report = merge(tmp_path / "base", [adapter], tmp_path / "out", exclude=["*router*"])

    assert [tensor.name for tensor in report.tensors] == [f"{Q}.weight"]


def test_a_tied_head_of_a_quantised_embedding_is_refused_by_the_embedding(tmp_path: Path) -> None:
    weights = factories.base_weights(dtype=torch.bfloat16)
    del weights["lm_head.weight"]
    weights["model.embed_tokens.weight"] = torch.randn(11, 6).to(torch.float8_e4m3fn)
    weights["model.embed_tokens.weight_scale"] = torch.ones(11, 1)
    base = factories.checkpoint_folder(
        tmp_path / "base",
        weights=weights,
        config={"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]},
    )
    adapter = one_module(tmp_path / "a", "lm_head", (11, 6))

    with pytest.raises(UnsupportedError) as caught:
        merge(base, [adapter], tmp_path / "out")

    assert caught.value.details == ("model.embed_tokens.weight   fp8: fp8 e4m3, a scale for 1 x 6",)


def test_weights_in_a_layout_that_is_not_read_are_copied_too(tmp_path: Path) -> None:
    weights = factories.base_weights(dtype=torch.bfloat16)
    weights["model.layers.0.mlp.up_proj.weight"] = torch.randint(-9, 9, (6, 8), dtype=torch.int8)
    weights["model.layers.0.mlp.up_proj.weight_scales"] = torch.ones(8).half()
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    adapter = one_module(tmp_path / "a", Q, (10, 6))

    merge(base, [adapter], tmp_path / "out")

    after = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(after[name], weights[name])
    assert torch.equal(after[f"{name}_scales"], weights[f"{name}_scales"])


def test_a_name_without_a_place_beside_an_unreadable_weight_names_that_weight(tmp_path: Path) -> None:
    weights = factories.base_weights(dtype=torch.bfloat16)
    weights["model.layers.0.mlp.up_proj.weight"] = torch.randint(-9, 9, (6, 8), dtype=torch.int8)
    weights["model.layers.0.mlp.up_proj.weight_scales"] = torch.ones(8).half()
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    adapter = factories.adapter_folder(tmp_path / "a", modules={Q: (10, 6), "model.layers.0.mlp.up_proj": (8, 6)})

    with pytest.raises(UnsupportedError, match="eetq") as caught:
        merge(base, [adapter], tmp_path / "out")

    assert "model.layers.0.mlp.up_proj.weight   eetq" in caught.value.details[0]


def test_a_config_that_no_tensor_bears_out_is_refused_by_its_scheme(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "vptq"}}
    base = factories.checkpoint_folder(tmp_path / "base", weights=factories.base_weights(), config=config)
    adapter = one_module(tmp_path / "a", Q, (10, 6))

    with pytest.raises(UnsupportedError, match="vptq"):
        merge(base, [adapter], tmp_path / "out")


def test_the_marker_of_a_comfyui_file_is_kept_and_is_no_weight(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    stored = {
        "model.diffusion_model.proj.weight": torch.randn(4, 6).to(torch.float8_e4m3fn),
        "model.diffusion_model.proj.scale_weight": torch.tensor(0.25),
        "model.diffusion_model.scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
        "model.diffusion_model.norm.weight": torch.ones(6),
    }
    save_file(stored, file)

    checkpoint = open_checkpoint(file)

    assert checkpoint.weights.keys() == {"model.diffusion_model.proj.weight", "model.diffusion_model.norm.weight"}
    values = stored["model.diffusion_model.proj.weight"].float() * 0.25
    assert torch.equal(checkpoint.weights["model.diffusion_model.proj.weight"].read(), values)
