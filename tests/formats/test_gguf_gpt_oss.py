"""llama.cpp computes what PEFT does with the experts of gpt-oss, fused by PEFT or one by one by Unsloth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peers
import peft
import pytest
import torch
import transformers
from formats.llama_cpp import NOT_COMPARED, VOCABULARY, add_vocabulary, computed, next_token
from safetensors.torch import save_file
from torch import Tensor

import loratools

pytestmark = peers.needs("xllamacpp", "gguf")
gguf = peers.load("gguf")

HIDDEN, INNER, EXPERTS, HEADS, KEY_HEADS, HEAD, LAYERS, RANK = 64, 96, 4, 4, 2, 16, 2, 3
ALPHA = 5
MIXTURE = "model.layers.{}.mlp.experts"


def base_model() -> Any:
    torch.manual_seed(3)
    model = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, head_dim=HEAD, num_local_experts=EXPERTS,
            num_experts_per_tok=2, max_position_embeddings=128, sliding_window=32, rms_norm_eps=1e-5, pad_token_id=0,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data.normal_(0.0 if parameter.dim() > 1 else 0.5, 0.15)
    model.lm_head.weight.data[NOT_COMPARED] = 0
    return model.eval()


def write_base(model: Any, path: Path) -> None:
    """The base as llama.cpp's conversion writes it: experts as (out, in), gate and up taken apart."""
    writer = gguf.GGUFWriter(path, "gpt-oss")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD)
    writer.add_sliding_window(32)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(INNER)
    writer.add_file_type(0)
    add_vocabulary(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT_OSS, LAYERS)
    for name, tensor in model.state_dict().items():
        layer = name.partition("layers.")[2].partition(".")[0]
        if ".experts." in name:
            leaf = "bias" if name.endswith("_bias") else "weight"
            values = tensor if leaf == "bias" else tensor.transpose(1, 2)
            parts = {"gate": values[:, 0::2], "up": values[:, 1::2]} if "gate_up" in name else {"down": values}
            for part, of in parts.items():
                writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.{leaf}", of.contiguous().numpy())
        elif name.endswith("sinks"):
            writer.add_tensor(f"blk.{layer}.attn_sinks.weight", tensor.numpy())
        elif "post_attention_layernorm" in name:
            writer.add_tensor(f"blk.{layer}.post_attention_norm.weight", tensor.numpy())
        else:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save_fused(model: Any, folder: Path) -> Any:
    """An adapter that PEFT trains on the parameters; the model with it."""
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj"], target_parameters=parameters)
    adapted = peft.get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.4)
    adapted.save_pretrained(folder)
    return adapted


def save_one_by_one(model: Any, folder: Path) -> Any:
    """An adapter of linear layers that Unsloth cuts the experts into; the model with its changes, in float64."""
    tensors: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(8)
    for layer in range(LAYERS):
        experts = model.get_submodule(MIXTURE.format(layer))
        for leaf, into, out in (("gate_up_proj", HIDDEN, 2 * INNER), ("down_proj", INNER, HIDDEN)):
            for expert in range(EXPERTS - 1):  # the last has none
                a, b = torch.randn(RANK, into, generator=generator), torch.randn(out, RANK, generator=generator) * 0.3
                key = f"base_model.model.{MIXTURE.format(layer)}.{leaf}s.{expert}"
                tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
                weight = getattr(experts, leaf).data[expert]
                weight.copy_(weight.double() + (ALPHA / RANK * b.double() @ a.double()).T)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    numbers = [str(number) for number in range(EXPERTS)]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": numbers}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("save", [save_fused, save_one_by_one])
def test_llama_cpp_computes_what_the_experts_compute(save: Any, tmp_path: Path) -> None:
    model = base_model()
    model.save_pretrained(tmp_path / "base")
    write_base(model, tmp_path / "base.gguf")
    plain = next_token(model)
    expected = next_token(save(model, tmp_path / "adapter"))

    loratools.convert(
        tmp_path / "adapter", tmp_path / "adapter.gguf", format="gguf", base=tmp_path / "base" / "config.json"
    )

    # Its cache of keys and values is of float16.
    torch.testing.assert_close(computed(tmp_path / "base.gguf", None), plain, rtol=0, atol=0.02)
    assert float((expected - plain).abs().max()) > 0.2
    torch.testing.assert_close(computed(tmp_path / "base.gguf", tmp_path / "adapter.gguf"), expected, rtol=0, atol=0.02)


def test_peft_loads_experts_that_were_trained_one_by_one(tmp_path: Path) -> None:
    model = base_model()
    model.save_pretrained(tmp_path / "base")
    plain = next_token(model)
    expected = next_token(save_one_by_one(model, tmp_path / "adapter"))

    loratools.convert(tmp_path / "adapter", tmp_path / "fused", format="peft", base=tmp_path / "base")

    loaded = peft.PeftModel.from_pretrained(base_model(), tmp_path / "fused").eval()
    assert float((expected - plain).abs().max()) > 0.2
    torch.testing.assert_close(next_token(loaded), expected, rtol=0, atol=1e-4)
