"""Whole tiny models, quantised by transformers and dequantised by it and by us: the same values."""

from __future__ import annotations

import json
from pathlib import Path

import peers
import pytest
import torch
from torch import Tensor

import loratools
from loratools.checkpoints import Checkpoint, open_checkpoint

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def assert_same_values(checkpoint: Checkpoint, theirs: dict[str, Tensor], packed: int) -> None:
    """All weights of the checkpoint are those of the model; so many of them are quantised."""
    assert checkpoint.quantisation is not None
    assert len(checkpoint.quantisation.weights) == packed
    assert checkpoint.weights.keys() <= theirs.keys()
    assert theirs.keys() - checkpoint.weights.keys() <= checkpoint.tied.keys()
    for name, weight in checkpoint.weights.items():
        assert torch.equal(weight.read().float(), theirs[name].float()), name


@peers.needs("bitsandbytes")
@pytest.mark.parametrize("nested", [False, True])
def test_a_llama_in_nf4_has_the_values_that_transformers_dequantises_it_to(tmp_path: Path, nested: bool) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "nf4")

    checkpoint = open_checkpoint(tmp_path / "nf4")

    assert_same_values(checkpoint, model.dequantize(dtype=torch.bfloat16).state_dict(), packed=2 * len(LINEAR))
    (entry,) = loratools.inspect(tmp_path / "nf4").to_dict()["sources"]
    (group,) = entry["quantised"]
    assert (group["scheme"], group["bits"], group["group"], len(group["weights"])) == ("bitsandbytes", 4, 64, 14)
    assert group["format"] == ("nf4, double quantisation" if nested else "nf4")
    assert entry["parameters"] == sum(p.numel() for p in LlamaForCausalLM(config).parameters())


def test_a_gpt_oss_in_mxfp4_has_the_values_that_transformers_dequantises_it_to(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Mxfp4Config

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=90, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    plain = GptOssForCausalLM(config).to(torch.bfloat16).state_dict()
    stored: dict[str, Tensor] = {}
    for name, values in plain.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = values.contiguous()
            continue
        experts, inputs, outputs = values.shape
        stored[f"{name}_blocks"] = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        stored[f"{name}_scales"] = torch.randint(118, 124, (experts, outputs, inputs // 32), dtype=torch.uint8)
    folder = tmp_path / "mxfp4"
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    written = {**config.to_dict(), "dtype": "bfloat16", "architectures": ["GptOssForCausalLM"]}
    written["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(written))
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )

    assert_same_values(open_checkpoint(folder), model.state_dict(), packed=4)


def test_a_llama_in_fp8_has_the_values_that_transformers_dequantises_it_to(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=80, hidden_size=128, intermediate_size=384, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    stored: dict[str, Tensor] = {}
    for name, values in LlamaForCausalLM(config).to(torch.bfloat16).state_dict().items():
        if name.rpartition(".")[0].endswith(LINEAR):
            stored[name] = (values * 3000).to(torch.float8_e4m3fn)
            grid = (values.shape[0] // 128, values.shape[1] // 128)
            stored[f"{name}_scale_inv"] = (torch.rand(grid) + 0.5) / 3000
        else:
            stored[name] = values.contiguous()
    folder = tmp_path / "fp8"
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    written = {**config.to_dict(), "dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}
    written["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(written))
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
    )

    assert_same_values(open_checkpoint(folder), model.state_dict(), packed=len(LINEAR))
