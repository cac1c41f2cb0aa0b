"""llama.cpp itself loads what we write as GGUF, and computes what PEFT computes."""

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

from loratools.ops.convert.verb import convert

# The server of llama.cpp in a wheel; it is heavy, and not everywhere.
pytestmark = peers.needs("xllamacpp", "gguf")
gguf = peers.load("gguf")

HIDDEN, HEADS, KEY_HEADS, LAYERS = 64, 4, 2, 2
FUSED_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model(model_type: str) -> Any:
    config = {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(3)
    if model_type == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    elif model_type == "glm4":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        model = transformers.Glm4ForCausalLM(
            transformers.Glm4Config(**config, head_dim=HIDDEN // HEADS, rope_parameters=rope, pad_token_id=0)
        )
    else:
        # The language model of Qwen2-VL computes what Qwen2 does where there is nothing to see.
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config))
    for parameter in model.parameters():
        parameter.data.normal_(0.0 if parameter.dim() > 1 else 0.5, 0.15)
    model.lm_head.weight.data[NOT_COMPARED] = 0
    return model.eval()


def write_base(model: Any, model_type: str, path: Path) -> None:
    """The base as llama.cpp's conversion writes it: rows of heads permuted, a tokenizer of bytes."""
    writer = gguf.GGUFWriter(path, model_type)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS // (2 if model_type == "glm4" else 1))
    if model_type == "qwen2vl":
        writer.add_rope_dimension_sections([2, 3, 3, 0])
    writer.add_file_type(0)
    add_vocabulary(writer)
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == model_type)
    names = gguf.get_tensor_name_map(arch, LAYERS)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        heads = {"q_proj": HEADS, "k_proj": KEY_HEADS}.get(name.split(".")[-2])
        if model_type == "llama" and heads is not None:
            values = values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen2vl", "glm4"])
def test_llama_cpp_computes_what_peft_computes(model_type: str, tmp_path: Path) -> None:
    model = base_model(model_type)
    model.save_pretrained(tmp_path / "base")
    write_base(model, model_type, tmp_path / "base.gguf")
    plain = next_token(model)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, rank_pattern={"model.layers.1.mlp.down_proj": 2},
        alpha_pattern={"q_proj": 9}, target_modules=TARGETS if model_type != "glm4" else FUSED_TARGETS,
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.15)
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = next_token(adapted)

    if model_type == "qwen2vl":
        saved = json.loads((tmp_path / "base" / "config.json").read_text())
        (tmp_path / "base" / "config.json").write_text(json.dumps({**saved, "model_type": "qwen2_vl"}))
    convert(tmp_path / "adapter", tmp_path / "adapter.gguf", format="gguf", base=tmp_path / "base" / "config.json")

    # Its cache of keys and values is of float16.
    torch.testing.assert_close(computed(tmp_path / "base.gguf", None), plain, rtol=0, atol=0.02)
    found = computed(tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    assert float((wanted - plain).abs().max()) > 1
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)
